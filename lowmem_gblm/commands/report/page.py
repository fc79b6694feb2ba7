"""The page of a report: what the template shows, and in which words and colours."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lowmem_gblm.commands.report import charts
from lowmem_gblm.commands.report.facts import facts
from lowmem_gblm.commands.report.kinds import Place
from lowmem_gblm.commands.report.measure import Measured, picture, representatives
from lowmem_gblm.errors import shown

# In the first lines of every page.
GENERATOR = "lowmem-gblm report"
_LONGEST_SIDE = 224
_MOST_PICTURES = 10
_HEIGHT = 22
_LONGEST_TEXT = 1000


def page(numbers: dict[str, Any], measured: Sequence[Measured]) -> str:
    """Return the report as one HTML text that refers to nothing outside of it."""
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"times": times, "percent": percent}
    outputs = numbers["outputs"]
    return environment.get_template("page.html").render(
        generator=GENERATOR,
        numbers=numbers,
        outputs=outputs,
        first=outputs[0],
        others=outputs[1:],
        model=_model(outputs[0]["run"]),
        kinds=list(dict.fromkeys(kind for one in outputs for kind in one["kinds"])),
        highest=charts.HIGHEST,
        level=charts.level,
        pictures=_pictures(measured),
        histogram=_histogram,
        maps=[_block_map(one) for one in outputs],
        facts=facts(outputs),
    )


def printable(value: Any) -> Any:
    """Return what the template prints: texts come from files, and are `shown`; markup is ours."""
    return shown(value, _LONGEST_TEXT) if type(value) is str else value


def times(value: float | None) -> str:
    """Return a dispersion as text: two digits, or what it means that there is none."""
    if value is None:
        return "fixed"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def percent(value: float) -> str:
    """Return a fraction as text."""
    return f"{value:.1%}"


def _model(run: dict[str, Any]) -> str:
    """Return the last part of a model's name or folder."""
    model = str(run.get("model", "a model"))
    return PurePath(model).name or model


def _pictures(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return masks of a representative matrix of each kind, those of all outputs together."""
    chosen = representatives(measured[0])[:_MOST_PICTURES]
    return [
        {"place": place, "images": [_image(one, place) for one in measured]} for place in chosen
    ]


def _image(one: Measured, place: Place) -> dict[str, Any]:
    density_RC = picture(one, place, _LONGEST_SIDE)
    if density_RC is None:
        return {"label": one.output.label, "uri": None}
    rows, columns = density_RC.shape
    # Small masks are enlarged by a factor that keeps all fields of one size.
    zoom = max(1, _LONGEST_SIDE // max(rows, columns))
    return {
        "label": one.output.label,
        "uri": charts.png_uri(density_RC),
        "width": columns * zoom,
        "height": rows * zoom,
        "dispersion": one.structures[place].columns.dispersion,
    }


def _histogram(lines: dict[str, Any]) -> dict[str, str]:
    """Return the paths of a histogram and of its expectation, on one scale."""
    observed, expected = lines["histogram"], lines["histogram_by_chance"]
    highest = max(*observed, *expected)
    return {
        "observed": charts.steps(observed, highest, _HEIGHT, closed=True),
        "expected": charts.steps(expected, highest, _HEIGHT, closed=False),
    }


def _block_map(output: dict[str, Any]) -> dict[str, Any]:
    """Return the matrices of an output as a table: a row for every block, a column for a kind."""
    matrices = output["matrices"]
    return {
        "label": output["label"],
        "kinds": list(output["kinds"]),
        "blocks": list(dict.fromkeys(matrix["block"] for matrix in matrices)),
        "cells": defaultdict(
            lambda: None, {(matrix["block"], matrix["kind"]): matrix for matrix in matrices}
        ),
    }
