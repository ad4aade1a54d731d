"""Invalid usage: one line that names the next step."""

from __future__ import annotations

import pytest

from shared_engine.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "in.csv", "--out", "o", "--device"], "argument --device: expected one argument"),
        (["embed", "in.csv", "--out", "o", "--dtype", "int4"], "invalid choice: 'int4'"),
        (
            ["embed", "in.csv", "--out", "o", "--modle", "m"],
            "unknown option --modle; did you mean --model?",
        ),
        (["serve", "--prot=80"], "unknown option --prot; did you mean --port?"),
        (["embed", "in.csv", "--out", "o", "--zzz"], "unrecognized arguments: --zzz"),
        (["bulk"], "invalid choice: 'bulk'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_invalid_usage_takes_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert printed.endswith(" --help\n")


def test_a_misspelt_model_is_recognized(capsys, tmp_path):
    for name in ("nvidia/llama-nemotron-embed-1bv2", "lama-nemotron-embed-1b-v2"):
        assert main(["check", "--model", name, "--device", "cpu"]) == 1
        assert "did you mean 'nvidia/llama-nemotron-embed-1b-v2'?" in capsys.readouterr().out
