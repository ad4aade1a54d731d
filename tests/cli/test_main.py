"""Invalid usage: one line that names the next step."""

from __future__ import annotations

import re

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
        (["embed", "in.csv", "--out", "o", "--prefixes", "{x"], "--prefixes: '{x' is not valid"),
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


def test_an_invalid_value_is_told_in_the_words_of_the_command_line(capsys):
    for option, value, message in (
        ("--prefixes", "off", "--prefixes: must be 'auto' or 'server'"),
        ("--max-tokens", "0", "--max-tokens: must be greater than 0"),
        ("--base-url", "nim:8000", "base_url= with host"),
    ):
        assert main(["embed", "in.csv", "--out", "o", option, value]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"nemoretriever: {message}")
        assert "Value error" not in printed


@pytest.mark.parametrize("command", ["serve", "check", "embed", "evaluate"])
def test_the_help_of_every_option_with_a_value_has_its_default(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = re.split(r"\n  (?=-)", capsys.readouterr().out.partition("\noptions:")[2])
    for text in options:
        head, _, rest = text.partition(" ")
        has_value = re.match(r"(\[?[A-Z{])", rest)
        assert not has_value or head == "--out" or re.search(r"[Dd]efault", text), text
        assert "None" not in text


def test_a_misspelt_model_is_recognized(capsys, tmp_path):
    for name in ("nvidia/llama-nemotron-embed-1bv2", "lama-nemotron-embed-1b-v2"):
        assert main(["check", "--model", name, "--device", "cpu"]) == 1
        assert "did you mean 'nvidia/llama-nemotron-embed-1b-v2'?" in capsys.readouterr().out


def test_serve_takes_the_model_without_its_option(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for arguments in ([str(tmp_path)], ["--model", str(tmp_path)]):
        assert main(["serve", *arguments, "--port", "0"]) == 1
        assert f"{tmp_path}/config.json: architectures is missing" in capsys.readouterr().err
    assert main(["serve", "one", "--model", "two"]) == 2
    assert "--model two: the model is given twice, one" in capsys.readouterr().err


def test_names_in_errors_cannot_control_the_terminal(capsys, tmp_path):
    for name in ("a\x1b[2J\n.csv", "b\x9b\u202e.csv"):
        path = str(tmp_path / name)
        assert main(["embed", path, "--out", str(tmp_path / "out"), "--model", "m"]) == 2
        printed = capsys.readouterr().err
        assert f"{ascii(path)[1:-1]} does not exist" in printed
        assert printed.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["check", "\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err
