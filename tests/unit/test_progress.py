"""Progress bars on a terminal."""

import io

from rich.console import Console

from topwork.cli.output.progress import ProgressBars


def test_progress_bar_shows_completed_items_and_metrics():
    stream = io.StringIO()
    progress = ProgressBars(Console(file=stream, force_terminal=True, width=120))
    with progress.track("transfer", total=4) as tracker:
        tracker.advance(3, loss=0.25)
    assert "transfer" in stream.getvalue()
    assert "3/4" in stream.getvalue()
    assert "loss 0.25" in stream.getvalue()


def test_progress_bar_shows_names_without_markup():
    stream = io.StringIO()
    progress = ProgressBars(Console(file=stream, force_terminal=True, width=120))
    with progress.track("[red]x[/red]", total=4) as tracker:
        tracker.advance(name="[bold]y[/bold]")
    assert "[red]x[/red]" in stream.getvalue()
    assert "name [bold]y[/bold]" in stream.getvalue()
