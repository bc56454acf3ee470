"""What is said of the time that is left, and of what an interrupted run has left."""

from pathlib import Path

import pytest

from mxtorq import console
from mxtorq.console import what_is_left


def test_a_run_that_goes_on_counts_its_own_layers_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(console, "_ERR", console.Console(stderr=True, width=200))
    say = console._log_lines()
    say("quantize", 3, 8)
    clock[0] += 40
    say("quantize", 4, 8)  # 40 s a layer, four to go
    assert capsys.readouterr().err == "quantize: 4/8 in 40 s, about 3 min left\n"
    clock[0] += 10
    say("quantize", 8, 8)
    assert capsys.readouterr().err == "quantize: 8/8 in 50 s\n"


def test_what_is_left_is_looked_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    find = what_is_left(out)
    assert find() == f"nothing was written to {out}"
    layers = tmp_path / "out.partial" / "layers"
    layers.mkdir(parents=True)
    (tmp_path / "out.partial" / "run.json").write_text('{"config": {"num_hidden_layers": 8}}')
    assert find() == f"nothing was written to {out}; the next run into it will clear {out}.partial"
    for index in range(3):
        (layers / f"{index:05d}.json").write_text("{}")
    end = f"kept in {out}.partial; run the same command again to go on"
    assert find() == f"3 of 8 layers are finished and {end}"
    (tmp_path / "out.partial" / "run.json").write_text("{")
    assert find() == f"3 layers are finished and {end}"
    for path in layers.iterdir():
        path.unlink()
    (tmp_path / "out.partial" / "rotations.json").write_text("{}")
    assert find() == f"the rotations of the whole model are {end}"
    out.mkdir()
    assert "was written and read back" in find()
    assert "was written and read back" not in what_is_left(out)()
