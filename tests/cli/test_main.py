"""Invalid usage: one line that names the next step."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from shared_engine.cli.main import build_parser, main
from tests.conftest import ROOT


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


@pytest.mark.parametrize("command", [[], ["serve"], ["check"], ["embed"], ["evaluate"]])
def test_help_has_examples_that_are_valid(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    examples = capsys.readouterr().out.partition("examples:\n")[2].partition("\n\n")[0]
    for line in examples.splitlines():
        program, *arguments = line.split()
        assert program == "nemoretriever"
        if "--help" not in arguments:
            assert build_parser().parse_args(arguments).run
    assert examples


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


KEY = "nvapi-this-is-secret"


@pytest.mark.parametrize(
    "arguments",
    [
        [KEY],
        ["serve", KEY],
        ["serve", "--rerank-model", KEY],
        ["check", KEY],
        ["check", "--base-url", KEY],
        ["check", "--base-url", f"http://localhost:9/v1?key={KEY}"],
        ["check", "--base-url", f"http://localhost:9/{KEY}/v1"],
        ["evaluate", KEY],
        ["embed", KEY, "--out", "out"],
        *(
            ["embed", "in.csv", "--out", "out", option, KEY]
            for option in (
                *("--model", "--checkpoint", "--device", "--dtype", "--dimensions", "--base-url"),
                *("--timeout", "--api-key", "--api-key-env", "--api-key-file", "--text-column"),
                *("--columns", "--types", "--role", "--prefixes", "--delimiter"),
            )
        ),
    ],
)
def test_a_key_in_the_wrong_place_is_not_shown(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.csv").write_text("text\na\n")
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("nemoretriever")
    assert "secret" not in printed.out + printed.err


def test_a_traceback_shows_no_key():
    code = (
        "import sys\n"
        "from shared_engine.cli import main\n"
        "def fail(args):\n"
        f"    raise ValueError('no such address: {KEY}')\n"
        "main.check.run = fail\n"
        "sys.argv = ['nemoretriever', 'check']\n"
        "sys.exit(main.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, text=True, capture_output=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: no such address: nvapi-***\n")


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
