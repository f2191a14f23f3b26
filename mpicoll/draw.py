"""Pictures of schedules, as text and as SVG: ranks across, rounds down; for pipelines, stages down and time across."""

from colorsys import hls_to_rgb
from fractions import Fraction

import numpy as np

from .interpreter import interpret_rounds, lockstep, span
from .pipeline import Kind, PipelineSchedule, Proof, Timing, simulate
from .schedule import Recv, Round, Schedule, Send, Verb, pieces
from .verify import own_chunks


def text(schedule: Schedule) -> str:
    """Draw a schedule as text, one line per round; ``legend`` explains the cells.  Scratch buffers are a, b, ..."""
    table = [[_cell(schedule, rank, round_) for rank, round_ in enumerate(rounds)] for rounds in lockstep(schedule)]
    heads = [f"rank {rank}" for rank in range(schedule.p)]
    widths = [max(map(len, column)) for column in zip(heads, *table, strict=True)]
    rows = [("round", heads), *((f"{t:5}", cells) for t, cells in enumerate(table))]
    return "\n".join(" │ ".join((label, *map(str.ljust, cells, widths))).rstrip() for label, cells in rows)


def legend(schedule: Schedule) -> str:
    """Explain the cells of ``text``."""
    if schedule.mixes:
        return "→1 sends its vector to rank 1; 1/3 + 2/3←1 takes a third of its own and two thirds of rank 1's"
    return "[2]→1 sends chunk 2 to rank 1; [2]←1 receives it from rank 1, [2]+←1 and adds it to its own; [4..1] wraps"


def _cell(schedule: Schedule, rank: int, round_: Round) -> str:
    if schedule.mixes:
        sends = [f"→{send.peer}" for send in round_.sends if send.peer != rank]
        shares = [share(recv.weight) + (f"←{recv.peer}" if recv.peer != rank else "") for recv in round_.recvs]
        return "  ".join([" ".join(sends), " + ".join(shares)]).strip() or "idle"
    sends = [f"{_buffer(send)}{span(schedule, send)}→{send.peer}" for send in round_.sends]
    recvs = [f"{_buffer(recv)}{span(schedule, recv)}{_SIGNS[recv.verb]}{recv.peer}" for recv in round_.recvs]
    return "  ".join(sends + recvs) or "idle"


_SIGNS = {Verb.COPY: "←", Verb.REDUCE_BELOW: "+←", Verb.REDUCE_ABOVE: "+←"}


def _buffer(part: Send | Recv) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[part.buffer - 1] if part.buffer else ""


def share(weight: float) -> str:
    """A weight as text: a fraction if it is a simple one."""
    simple = Fraction(weight).limit_denominator(999)
    return str(simple) if abs(simple - weight) < 1e-9 else f"{weight:.3g}"


def svg(schedule: Schedule, title: str) -> str:
    """Draw a schedule as SVG: the contents of each rank's vector before and after every round, and the messages.

    A rank is a box with a column for each chunk and a row, and a color, for each rank; a colored cell says that this
    rank's contribution is in that chunk.  Where vectors are mixed, a bar's length is the share of the contribution.
    """
    return _Picture(schedule).draw(title)


class _Canvas:
    """A canvas for SVG elements.  Lengths are in pixels; x and y of a box are its upper left corner."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def label(self, x: float, y: float, what: str, color: str, anchor: str = "start", size: float = 12) -> None:
        escaped = what.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}" text-anchor="{anchor}">{escaped}</text>'
        )

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{stroke}"/>'
        )

    def document(self, width: float, height: float, title: str, caption: str) -> str:
        """Return the SVG document on white, wide enough for the title above and the caption below."""
        wide = max(width, 7 * max(len(title) * 1.2, len(caption)) + 30)
        self.label(16, 28, title, "#111", size=16)
        self.label(16, height - 14, caption, "#555")
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide:g}" height="{height:g}" '
                f'viewBox="0 0 {wide:g} {height:g}" font-family="Helvetica, Arial, sans-serif">',
                '<rect width="100%" height="100%" fill="white"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


class _Picture(_Canvas):
    """The picture of a schedule: the vectors of all ranks, round by round."""

    gap_x, gap_y = 26, 54
    left, top = 46, 74

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.mixes = schedule.mixes
        self.row = max(3, min(9, 72 // schedule.p))
        self.column = 72 if self.mixes else max(6, min(24, 96 // schedule.chunks))
        self.width, self.height = self.column * schedule.chunks, self.row * schedule.p
        self.colors = [_color(rank / schedule.p) for rank in range(schedule.p)]

    def x(self, rank: int) -> float:
        return self.left + rank * (self.width + self.gap_x)

    def y(self, t: int) -> float:
        return self.top + t * (self.height + self.gap_y)

    def draw(self, title: str) -> str:
        schedule = self.schedule
        table = lockstep(schedule)
        for rank in range(schedule.p):
            self.label(self.x(rank) + self.width / 2, self.top - 14, f"rank {rank}", self.colors[rank], "middle")
        for t, held in enumerate(interpret_rounds(schedule, own_chunks(schedule, np.eye(schedule.p)), np.add)):
            for rank, chunks in enumerate(held):
                self.box(rank, t, chunks)
        for t, rounds in enumerate(table):
            self.label(self.left - 14, self.y(t) + self.height + self.gap_y / 2 + 4, str(t), "#555", "end")
            for rank, round_ in enumerate(rounds):
                self.arrows(t, rank, round_)
        width, height = self.x(schedule.p) - self.gap_x + 20, self.y(len(table)) + self.height + 44
        caption = (
            "bars: whose contribution is in a vector, and how much of it; the line: an equal share"
            if self.mixes
            else "columns: chunks; rows: whose contribution is in them; solid arrows: added, dashed: copied"
        )
        return self.document(width, height, title, caption)

    def box(self, rank: int, t: int, chunks: list[np.ndarray | None]) -> None:
        x, y = self.x(rank), self.y(t)
        self.rectangle(x, y, self.width, self.height, "#f1f1f1")
        for n, counts in enumerate(chunks):
            for origin in [] if counts is None else np.flatnonzero(counts).tolist():
                length = self.column * counts[origin] if self.mixes and counts is not None else self.column
                self.rectangle(x + n * self.column, y + origin * self.row, length, self.row, self.colors[origin])
        lines = [f"M{x + n * self.column:g},{y:g}v{self.height:g}" for n in range(1, self.schedule.chunks)]
        if self.mixes:
            lines = [f"M{x + self.width / self.schedule.p:g},{y:g}v{self.height:g}"]
        self.parts.append(f'<path d="{"".join(lines)}" stroke="{"#333" if self.mixes else "white"}" stroke-width="1"/>')
        self.rectangle(x, y, self.width, self.height, "none", "#888")

    def arrows(self, t: int, rank: int, round_: Round) -> None:
        """Draw the arrows of the messages that ``rank`` receives."""
        color_of = self.colors
        for recv in round_.recvs:
            if recv.peer == rank:
                continue
            dash = ' stroke-dasharray="4 3"' if recv.verb is Verb.COPY else ""
            for lo, hi in pieces(recv.lo, recv.hi, self.schedule.chunks):
                inset, length = lo * self.column, (hi - lo) * self.column
                x1, y1 = self.x(recv.peer) + inset, self.y(t) + self.height + 4
                x2, y2 = self.x(rank) + inset, self.y(t + 1) - 4
                for x, y in ((x1, y1), (x2, y2)):
                    self.parts.append(
                        f'<path d="M{x + 1:g},{y:g}h{length - 2:g}" stroke="{color_of[recv.peer]}" stroke-width="2"/>'
                    )
                x1, x2, middle = x1 + length / 2, x2 + length / 2, (y1 + y2) / 2
                self.parts.append(
                    f'<path d="M{x1:g},{y1:g}C{x1:g},{middle:g} {x2:g},{middle:g} {x2:g},{y2 - 7:g}" fill="none" '
                    f'stroke="{color_of[recv.peer]}" stroke-width="1.5"{dash}/>'
                    f'<path d="M{x2:g},{y2:g}l-4,-8h8z" fill="{color_of[recv.peer]}"/>'
                )


def _color(turn: float) -> str:
    red, green, blue = hls_to_rgb(turn, 0.45, 0.65)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def gantt_text(schedule: PipelineSchedule) -> str:
    """Draw a pipeline as text: a line for each stage, a column for each task, as if all tasks took equally long."""
    timing = simulate(schedule, [1] * schedule.stages, [1] * schedule.stages)
    table = [["·"] * timing.makespan for _ in schedule.tasks]
    for cells, tasks, starts in zip(table, schedule.tasks, timing.start, strict=True):
        for task, start in zip(tasks, starts, strict=True):
            cells[start] = str(task)
    width = len(f"F{schedule.micro - 1}")
    label = len(f"stage {schedule.stages - 1}")
    return "\n".join(
        f"{f'stage {stage}':{label}} │ {' '.join(f'{cell:{width}}' for cell in cells)}".rstrip()
        for stage, cells in enumerate(table)
    )


GANTT_LEGEND = "F3 takes micro-batch 3 forward through the stage's layers, B3 backward; ·: idle"


def gantt_svg(schedule: PipelineSchedule, proof: Proof, timing: Timing, title: str) -> str:
    """Draw a pipeline as SVG: the tasks of each stage at the times that ``simulate`` returned or that were measured."""
    return _Gantt(schedule, timing).draw(proof, title)


_FILLS = {Kind.FORWARD: "#3a76b8", Kind.BACKWARD: "#d9822b"}


class _Gantt(_Canvas):
    """The picture of a pipeline: a row for each stage, time across."""

    left, top, row, gap = 76, 78, 30, 8

    def __init__(self, schedule: PipelineSchedule, timing: Timing) -> None:
        super().__init__()
        self.schedule, self.timing = schedule, timing
        steps = 2 * (schedule.micro + schedule.stages - 1)
        self.width = max(400, min(30 * steps, 960), 12 * steps)

    def draw(self, proof: Proof, title: str) -> str:
        right = self.left + self.width
        self.parts.append(
            '<defs><pattern id="idle" width="6" height="6" patternUnits="userSpaceOnUse">'
            '<rect width="6" height="6" fill="#f4f4f4"/><path d="M0,6L6,0" stroke="#c4c4c4"/></pattern></defs>'
        )
        self.key()
        self.label(right + 12, self.top - 12, "idle", "#555")
        self.label(right + 54, self.top - 12, "holds", "#555")
        for stage, share in enumerate(self.timing.idle):
            y = self.top + stage * (self.row + self.gap)
            middle = y + self.row / 2 + 4
            self.label(self.left - 12, middle, f"stage {stage}", "#111", "end")
            self.rectangle(self.left, y, self.width, self.row, "url(#idle)")
            self.tasks(stage, y)
            self.label(right + 12, middle, f"{float(share):.0%}", "#111")
            self.label(right + 54, middle, str(proof.held[stage]), "#111")
        bottom = self.top + self.schedule.stages * (self.row + self.gap)
        self.parts.append(
            f'<path d="M{self.left:g},{bottom + 6:g}h{self.width:g}" stroke="#555"/>'
            f'<path d="M{right:g},{bottom + 6:g}l-7,-4v8z" fill="#555"/>'
        )
        self.label(right, bottom + 24, "time", "#555", "end")
        idle = float(sum(self.timing.idle)) / self.schedule.stages
        caption = (
            f"numbers: micro-batches; stages are idle for {idle:.0%} of the time, "
            f"and hold the activations of at most {max(proof.held)} micro-batches"
        )
        return self.document(right + 104, bottom + 60, title, caption)

    def key(self) -> None:
        """Draw the legend of the colors."""
        x, y = float(self.left), self.top - 22
        for what, fill in (
            *((kind.name.lower(), color) for kind, color in _FILLS.items()),
            ("idle", "url(#idle)"),
        ):
            self.rectangle(x, y, 12, 12, fill)
            self.label(x + 18, y + 10, what, "#555")
            x += 34 + 7 * len(what)

    def tasks(self, stage: int, y: float) -> None:
        scale = self.width / (float(self.timing.makespan) or 1)
        spans = zip(self.schedule.tasks[stage], self.timing.start[stage], self.timing.end[stage], strict=True)
        for task, start, end in spans:
            x, width = self.left + float(start) * scale, float(end - start) * scale
            self.rectangle(x, y, width, self.row, _FILLS[task.kind], "white")
            size = min(13, 1.6 * (width - 2) / len(str(self.schedule.micro - 1)))
            if size >= 5:
                self.label(x + width / 2, y + self.row / 2 + size / 3, str(task.micro), "white", "middle", size)
