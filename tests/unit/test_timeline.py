"""The timeline's picture: what it shows, that nothing overlaps, that it reads in grey."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from csipipe.comm.topology import Topology
from csipipe.pipeline.schedule import ACTIVITY, TRAINING, Op
from csipipe.profiling import timeline
from csipipe.profiling.spans import Row, Span

MS = 1_000_000


def row(role: str, micro_batches: int, start: int) -> Row:
    """A stage's plan, 10 ms per instruction."""
    spans = []
    for place, instruction in enumerate(TRAINING["zerobubble"](0, 2, micro_batches)):
        what = instruction.op.value
        activity = ACTIVITY.get(instruction.op, "compute")
        begin = (start + 10 * place) * MS
        spans.append(Span(activity, what, instruction.micro_batch, 1, begin, begin + 10 * MS))
    return Row(role, spans)


def example(ranks: int, micro_batches: int, together: bool = False) -> timeline.Timeline:
    topology = Topology(ranks, ranks if together else ranks // 2, 2 * ranks, together)
    roles = [topology.role(rank) for rank in range(ranks)]
    rows = [row(role, micro_batches, 3 * place) for place, role in enumerate(roles)]
    return timeline.Timeline.of(rows, 1, "a title\nof two lines", "micro-batch")


def texts(figure: Figure) -> list[Text]:
    found = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text() != "")
    return [text for text in found if isinstance(text, Text) and text.get_visible()]


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "together"), [(2, 32, False), (16, 4, False), (4, 4, True)]
)
def test_texts_lie_inside_and_apart(ranks: int, micro_batches: int, together: bool) -> None:
    figure = timeline.draw(example(ranks, micro_batches, together))
    figure.draw_without_rendering()
    boxes = {text: text.get_window_extent() for text in texts(figure)}
    whole = figure.bbox
    for text, box in boxes.items():
        inside = box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0 and box.y1 <= whole.y1
        assert inside, text.get_text()
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not a.overlaps(b), (one.get_text(), other.get_text())


def test_numbers_stand_on_what_is_computed_where_there_is_room() -> None:
    roomy = [text.get_text() for text in texts(timeline.draw(example(2, 2)))]
    assert roomy.count("1") >= 2 * 3  # forward, backward, weight gradients of both ranks
    crowded = texts(timeline.draw(example(2, 80)))
    assert not any(text.get_text() == "79" for text in crowded)


def test_shares_and_roles_stand_beside_the_rows() -> None:
    figure = timeline.draw(example(2, 2))
    seen = [text.get_text() for text in texts(figure)]
    plan = list(TRAINING["zerobubble"](0, 2, 2))
    busy = sum(not i.op.value.startswith(("send", "receive")) for i in plan)
    assert seen.count(f"{1 - busy / len(plan):.0%}") == 2
    assert {"BTS stage 0", "UE rank 1 (UEs 0-3)", "bubble", "a title\nof two lines"} <= set(seen)
    assert {"forward", "backward", "weight gradients", "send", "wait"} <= set(seen)


def test_time_counts_from_the_first_span() -> None:
    shown = example(2, 2)
    later = [Row(one.role, [span.shifted(10**18) for span in one.spans]) for one in shown.rows]
    axes = timeline.draw(replace(shown, rows=later)).axes[0]
    last = max(span.end for one in shown.rows for span in one.spans)
    assert axes.get_xlim() == pytest.approx((0, last / MS))
    boxes = [patch.get_bbox() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert (min(box.x0 for box in boxes), max(box.x1 for box in boxes)) == axes.get_xlim()


def test_bubbles_are_of_all_iterations_and_the_picture_of_one() -> None:
    busy, waiting = Span("compute", "step", None, 1, 0, 10), Span("wait", "dz", None, 2, 20, 50)
    shown = timeline.Timeline.of([Row("stage 0", [busy, waiting])], 1, "", "")
    assert shown.bubbles == [0.75]
    assert shown.rows == [Row("stage 0", [busy])]


def test_kinds_differ_in_grey() -> None:
    def lightness(kind: timeline.Kind) -> float:
        red, green, blue = to_rgb(kind.fill)
        return float(0.299 * red + 0.587 * green + 0.114 * blue)

    pipeline = [timeline.FORWARD, timeline.HEAD, timeline.BACKWARD, timeline.WEIGHTS, timeline.SEND]
    for a, b in itertools.combinations([*pipeline, timeline.OTHER, timeline.WAIT], 2):
        assert a.hatch != b.hatch or abs(lightness(a) - lightness(b)) > 0.1, (a.label, b.label)
    for kind in pipeline:  # the number on it
        dark, light = sorted([lightness(kind), sum(to_rgb(kind.ink)) / 3])
        assert light - dark > 0.4, kind.label


def test_every_instruction_has_a_kind() -> None:
    for op in Op:
        activity = ACTIVITY.get(op, "compute")
        kind = timeline.kind_of(Span(activity, op.value, 0, 1, 0, 1))
        assert (kind is timeline.OTHER) == (op is Op.STEP), op
