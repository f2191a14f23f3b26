"""``mpicoll predict``: use a trained model."""

from pathlib import Path

import click

from ..errors import UserError
from ..files import writing
from ..mpi.launch import launched_ranks


@click.command(short_help="Use a trained model.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "source",
    metavar="SOURCE",
    help="What train takes; an .npz or .csv file need have no labels [default: digits, if MODEL was trained on them].",
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the predicted classes here, one a line."
)
def predict(model: Path, source: str | None, out: Path | None) -> None:
    """Predict the classes of the samples in --data with MODEL, the folder a training run wrote.

    Prints the predicted classes, one a line, unless --out names a file; and the accuracy, if the data have labels.
    Columns are those of the training set: by name where both name them, and counted from 0 or 1 as there.
    """
    if launched_ranks() > 1:
        raise UserError("predict runs on one process: start it without mpirun")
    import numpy as np

    from ..train.data import read
    from ..train.run_folder import read_model

    network, params, scaling, schema = read_model(model)
    if source is None:
        source = "digits"
        if (schema.features, schema.labels.tolist(), schema.columns) != (64, list(range(10)), None):
            raise UserError(f"{str(model)!r} was not trained on the digits: name the data with --data FILE")
    data, _ = read(source, schema)
    with np.errstate(all="ignore"):  # what overflows is reported
        scaled = scaling.apply(data.x, params.dtype)
    if not np.isfinite(scaled if isinstance(scaled, np.ndarray) else scaled.data).all():
        raise UserError(
            f"{source!r} has features that overflow {params.dtype} when scaled: nothing like the training set"
        )
    classes = network.predict(params, scaled)
    # In UTF-8 whatever the locale, and bytes of a label that are no text as they were.
    lines = "".join(f"{label}\n" for label in schema.labels[classes]).encode(errors="surrogateescape")
    if out is None:
        click.echo(lines, nl=False)
    else:
        with writing(repr(str(out))):
            out.write_bytes(lines)
        click.echo(f"{len(classes)} predictions written to {out}")
    if data.y is not None:
        right = int(np.count_nonzero(classes == data.y))
        click.echo(f"accuracy {right / len(data.y):.2%} ({right} of {len(data.y)})", err=out is None)
