"""``mpicoll`` and its subcommands."""

import click

from .. import __version__
from ..mpi.launch import launched_rank, tell_of_variables
from .bench import bench
from .doctor import doctor, options
from .plot import plot
from .predict import predict
from .report import report
from .show import show
from .train import train
from .tune import tune
from .verify import verify

CONTEXT = {"auto_envvar_prefix": "MPICOLL", "help_option_names": ["-h", "--help"]}


@click.group(invoke_without_command=True, context_settings=CONTEXT)
@click.version_option(__version__, message="mpicoll %(version)s", allow_from_autoenv=False)
@click.pass_context
def app(context: click.Context) -> None:
    """Collective communication and distributed SGD over MPI.

    Start train, bench, tune and doctor under a launcher (mpirun -n 4 mpicoll train); the other commands need none.
    Every option is an environment variable too: MPICOLL_TRAIN_EPOCHS=5.  MPICOLL_TRACEBACK=1 shows where an error came
    from.

    Exit status: 0 done, 1 something is wrong with the input or a rank failed, 2 usage, 130 interrupted.
    """
    if launched_rank() == 0 and context.invoked_subcommand != "doctor":  # which has it among what it finds
        tell_of_variables(options(context))
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (train, bench, tune, doctor, plot, predict, show, verify, report):
    app.add_command(command)
