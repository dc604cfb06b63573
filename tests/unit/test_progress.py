"""What a person sees while a job runs."""

import io
import json

import pytest
from rich.console import Console

from topwork.progress import BarProgress, LineProgress


def test_lines_are_one_a_thing_said():
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.epoch("transfer", 1, 20, loss=0.123456, accuracy=0.9)
    with progress.track("transfer", total=10) as tracker:
        tracker.advance(loss=0.1)
    progress.note("stored", uri="s3://a b/c")
    first, second = stream.getvalue().splitlines()
    assert first.split(" ", 1)[1] == "epoch stage=transfer epoch=1 epochs=20 loss=0.1235 accuracy=0.9"
    assert second.split(" ", 1)[1] == 'stored uri="s3://a b/c"'


def test_json_lines_keep_numbers_whole():
    stream = io.StringIO()
    LineProgress(stream, as_json=True).epoch("transfer", 2, 3, loss=0.123456)
    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {"message": "epoch", "stage": "transfer", "epoch": 2, "epochs": 3, "loss": 0.123456}


def test_a_loss_that_is_lost_is_still_json():
    stream = io.StringIO()
    LineProgress(stream, as_json=True).note("epoch", loss=float("nan"), best=float("inf"))
    assert json.loads(stream.getvalue(), parse_constant=pytest.fail) | {"time": ""} == {
        "time": "",
        "message": "epoch",
        "loss": "nan",
        "best": "inf",
    }


def test_a_bar_shows_how_far_and_the_facts_beside_it():
    stream = io.StringIO()
    progress = BarProgress(Console(file=stream, force_terminal=True, width=120))
    with progress.track("transfer", total=4) as tracker:
        tracker.advance(3, loss=0.25)
    assert "transfer" in stream.getvalue()
    assert "3/4" in stream.getvalue()
    assert "loss 0.25" in stream.getvalue()


def test_names_from_strangers_are_no_markup():
    stream = io.StringIO()
    BarProgress(Console(file=stream, width=120)).note("class [red]x[/red]", name="[bold]y[/bold]")
    assert stream.getvalue() == "class [red]x[/red]  name [bold]y[/bold]\n"
