"""Ordinary clients of OpenAI's API at `nemoretriever serve`: the engine's vectors, or a next step.

    python -m venv ../clients
    ../clients/bin/pip install openai litellm langchain-openai llama-index-embeddings-openai-like
    npm install --prefix ../clients openai @langchain/openai @langchain/core ai @ai-sdk/openai
    python tests/benchmarks/clients.py ../clients

Each client embeds texts under the three names of a model: NAME-query and NAME-passage, whose
vectors are compared with the engine's, and NAME, at a server without `--default-input-type` and
with it. Open WebUI is a copy of its request, as the application is large, without and with the
settings that send `input_type`.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

TEXTS = [
    "How do I return a product?",
    "Der Versand kostet 4,90 €.",
    "東京は日本の首都です。 👍🏽",
] * 7
CLIENT = "OpenAI(base_url=url, api_key='none')"
PYTHON = {
    "openai": f"{CLIENT}.embeddings.create(model=model, input=texts).data",
    "openai, floats, 16 values": (
        f"{CLIENT}.embeddings.create("
        "model=model, input=texts, encoding_format='float', dimensions=16).data"
    ),
    "openai, extra_body": (
        f"{CLIENT}.embeddings.create("
        "model=model.removesuffix('-query').removesuffix('-passage'), input=texts, "
        "extra_body={'input_type': 'query' if model.endswith('-query') else 'passage'}).data"
    ),
    "openai, token ids": f"{CLIENT}.embeddings.create(model=model, input=[[1, 2]] * 21).data",
    "litellm": (
        "litellm.embedding(f'openai/{model}', input=texts, api_base=url, api_key='none').data"
    ),
    "langchain-openai": (
        "OpenAIEmbeddings(model=model, base_url=url, api_key='none', "
        "check_embedding_ctx_length=False).embed_documents(texts)"
    ),
    "llama-index openai-like": (
        "OpenAILikeEmbedding(model_name=model, api_base=url, api_key='none')"
        ".get_text_embedding_batch(texts)"
    ),
    "Open WebUI": "post({'input': texts, 'model': model})",
    "Open WebUI, RAG_EMBEDDING_PREFIX_FIELD_NAME": (
        "post({'input': texts, 'model': model.removesuffix('-query').removesuffix('-passage'), "
        "'input_type': 'query' if model.endswith('-query') else 'passage'})"
    ),
}
IMPORTS = {
    "openai": "from openai import OpenAI",
    "litellm": "import litellm",
    "langchain-openai": "from langchain_openai import OpenAIEmbeddings",
    "llama-index openai-like": (
        "from llama_index.embeddings.openai_like import OpenAILikeEmbedding"
    ),
    "Open WebUI": (
        "import requests\n"
        "def post(body):\n"
        "    r = requests.post(f'{url}/embeddings', json=body)\n"
        "    if not r.ok: raise ValueError(r.text)\n"
        "    return r.json()['data']"
    ),
}
PYTHON_PROGRAM = """
import json, sys
url, texts, models = json.load(sys.stdin)
{imports}
def call(model):
    try:
        found = {call}
    except Exception as exc:
        return str(exc)
    rows = [getattr(row, "embedding", row) for row in found]
    return [row["embedding"] if isinstance(row, dict) else list(row) for row in rows]
print("\\n" + json.dumps([call(model) for model in models]))
"""
JAVASCRIPT = {
    "openai (JavaScript)": (
        "import OpenAI from 'openai';"
        "const client = new OpenAI({baseURL: url, apiKey: 'none', maxRetries: 0});",
        "(await client.embeddings.create({model, input: texts})).data.map((row) => row.embedding)",
    ),
    "@langchain/openai": (
        "import {OpenAIEmbeddings} from '@langchain/openai';",
        "await new OpenAIEmbeddings({model, apiKey: 'none', maxRetries: 0, "
        "configuration: {baseURL: url}}).embedDocuments(texts)",
    ),
    "Vercel's ai with @ai-sdk/openai": (
        "import {embedMany} from 'ai'; import {createOpenAI} from '@ai-sdk/openai';"
        "const provider = createOpenAI({baseURL: url, apiKey: 'none'});",
        "(await embedMany({model: provider.embedding(model), values: texts, maxRetries: 0}))"
        ".embeddings",
    ),
}
JAVASCRIPT_PROGRAM = """
import {{readFileSync}} from 'node:fs';
const [url, texts, models] = JSON.parse(readFileSync(0, 'utf8'));
{imports}
const found = [];
for (const model of models) {{
  try {{ found.push(await (async () => {call})()); }}
  catch (error) {{ found.push(error.message); }}
}}
console.log('\\n' + JSON.stringify(found));
"""


def main() -> None:
    """Print a row for each client."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a virtual environment with node_modules")
    folder = parser.parse_args().folder.resolve()
    from shared_engine import Embedder, Options
    from tests.support.checkpoints import PROMPTS, build_checkpoint

    with tempfile.TemporaryDirectory() as name:
        model = build_checkpoint(Path(name) / "tiny", prompts=PROMPTS, matryoshka_dimensions=(16,))
        roles: Any = {"tiny-query": "query", "tiny-passage": "document", "tiny": "document"}
        with Embedder(Options(model=str(model), dtype="float32")) as embedder:
            expected = {served: embedder.embed(TEXTS, role) for served, role in roles.items()}
        with serving(model) as url, serving(model, "--default-input-type", "passage") as other:
            print("| client | NAME-query | NAME-passage | NAME | NAME, default passage |")
            print("|---|---|---|---|---|")
            for client in [*PYTHON, *JAVASCRIPT]:
                first = run(client, folder, url, list(expected))
                last = run(client, folder, other, ["tiny"])
                cells = [
                    judge(found, expected[served])
                    for served, found in zip([*expected, "tiny"], [*first, *last], strict=True)
                ]
                print(f"| {client} | {' | '.join(cells)} |", flush=True)


@contextmanager
def serving(model: Path, *options: str) -> Iterator[str]:
    """Run the command until the block ends; give the address of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "shared_engine.cli", "serve", str(model), "--port", str(port)]
    process = subprocess.Popen([*command, "--dtype", "float32", *options], cwd=ROOT)
    try:
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/v1/health/ready").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None, "the server has ended"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def run(client: str, folder: Path, url: str, models: list[str]) -> list[Any]:
    """Return the vectors of each model, or the message of its error."""
    if client in PYTHON:
        imports = IMPORTS[client.partition(",")[0]]
        source = PYTHON_PROGRAM.format(imports=imports, call=PYTHON[client])
        command = [str(folder / "bin" / "python"), "-c", source]
    else:
        imports, call = JAVASCRIPT[client]
        source = JAVASCRIPT_PROGRAM.format(imports=imports, call=call)
        command = ["node", "--input-type=module", "-e", source]
    done = subprocess.run(
        command,
        input=json.dumps([url, TEXTS, models]),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return [f"does not run: {lines[-1]}"] * len(models)
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judge(found: Any, expected: Any) -> str:
    """Return how far vectors are from the engine's, or the message."""
    if isinstance(found, str):
        return "refused: " + found.replace("|", r"\|").replace("\n", " ")
    vectors = np.array(found)
    wanted = expected[:, : vectors.shape[1]]
    wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    return f"equal to {np.abs(vectors - wanted).max():.0e}"


if __name__ == "__main__":
    main()
