"""Every option there is, once. Both adapters inherit them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from shared_engine.catalogue import DEFAULT_MODEL
from shared_engine.endpoints import check_header, normalize_url
from shared_engine.errors import ConfigurationError
from shared_engine.vectors import EmbeddingType

DType = Literal["auto", "float32", "bfloat16", "float16"]
Truncate = Literal["NONE", "START", "END"]

Scope = Literal["routing", "engine", "local", "nim", "request"]
"""Whom an option concerns: the choice between here and a NIM; whatever engine was chosen; an engine
here; a NIM's client; or each request alone, so that engines are shared whatever its value."""

_HINTS = {
    "async_http_client": "give http_client_factory=, a function that makes an httpx.AsyncClient",
    "batch_size": "max_batch_size= bounds a request to a NIM; here steps are formed by tokens",
    "infer_path": "give base_url=, the root of the server or its /v1",
    "input_type": "the method says it: a query, or a document",
    "mode": "give base_url=, or backend=",
    "nvidia_api_base": "give base_url=",
    "organization": "give default_headers=",
    "trucate": "give truncate=",
    "usage_telemetry_enabled": "nothing is reported; leave it out",
}
"""What to do instead of options that NVIDIA's and others' adapters have."""
_NOT_PICKLED = SecretStr("")
"""Stands for a key in a pickle: one was given, and NVIDIA_API_KEY has it in the new process."""


def _option(scope: Scope, **field: Any) -> Any:
    # An engine in use does not change, so options are frozen; copy with model_copy().
    return Field(frozen=True, json_schema_extra={"scope": scope}, **field)


def _secret(scope: Scope, **field: Any) -> Any:
    return _option(scope, repr=False, exclude=True, **field)


class Options(BaseModel):
    """Which model, where it runs, and what its vectors look like. Unknown options are refused.

    With `base_url`, a NIM at that address computes; with `api_key` alone, NVIDIA's hosted catalogue
    does; otherwise this process. `backend` says it outright. NVIDIA_BASE_URL in the environment is
    the address where nothing given says otherwise, such as a `device` or a folder as `model`.
    `nvidia_api_key` and `nvidia_base_url` are other names of the two, and win over them.

    A pickle holds everything but the key: the process that loads it reads NVIDIA_API_KEY. The key
    is in no repr and no dump, nor are headers and proxy; copies keep them, and pickles keep those
    two, so put no secret there that a pickle must not hold.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), hide_input_in_errors=True)

    model: str = _option(
        "engine",
        default=DEFAULT_MODEL,
        min_length=1,
        description="Name or alias of a model in the catalogue, a Hugging Face id, or a folder.",
    )
    checkpoint: str | None = _option(
        "local",
        default=None,
        description="Folder or Hugging Face id of the weights, where `model` is only their name.",
    )
    revision: str | None = _option(
        "local", default=None, description="Branch, tag or commit of a Hugging Face id."
    )
    device: str = _option(
        "local",
        default="auto",
        description='"cpu", "cuda", "cuda:1"; auto is a CUDA GPU if there is one, else the CPU. '
        'With "cuda:0,cuda:1" both take steps from one queue.',
    )
    dtype: DType = _option(
        "local",
        default="auto",
        description="Number type of the weights; auto is bfloat16 where the device multiplies it.",
    )
    dimensions: int | None = _option(
        "request",
        default=None,
        gt=0,
        description="Length of a vector; None is the model's full size.",
    )
    embedding_type: EmbeddingType = _option(
        "request", default="float", description="Number type of a vector's values."
    )
    truncate: Truncate = _option(
        "request",
        default="NONE",
        description="A text over the limit is refused (NONE), or loses its START or END.",
    )
    max_tokens: int | None = _option(
        "local",
        default=None,
        gt=0,
        description="A limit below the model's own, prefix and BOS included.",
    )
    max_tiles: int | None = _option(
        "local",
        default=None,
        gt=0,
        le=12,
        description="Tiles that an image is cut into at most, beside a thumbnail of the whole; "
        "None is what the checkpoint says. More show more detail and take longer.",
    )
    allow_image_urls: bool = _option(
        "engine",
        default=False,
        description="Fetch images from http and https addresses on the public internet.",
    )
    max_batch_tokens: int | None = _option(
        "local",
        default=None,
        gt=0,
        description="The most tokens in one forward pass; None suits the device.",
    )
    show_progress: bool = _option("request", default=False, description="Show a progress bar.")

    backend: Literal["auto", "local", "nim"] = _option(
        "routing",
        default="auto",
        description="Where to compute: in this process (local) or at a NIM; auto decides by what "
        "else is given.",
    )
    base_url: str | None = _option(
        "routing",
        default=None,
        description="Address of a NIM, its root or /v1: http://localhost:8000/v1. Replicas stand "
        "behind a load balancer with one address.",
    )
    api_key: SecretStr | None = _secret(
        "routing",
        default=None,
        description="Key for the NIM or the catalogue; None reads NVIDIA_API_KEY.",
    )
    allow_insecure_key: bool = _option(
        "nim",
        default=False,
        description="Allow the key to travel unencrypted to a public host.",
    )
    default_headers: dict[str, str] = _secret(
        "nim", default_factory=dict, description="Headers of every request to the NIM."
    )
    timeout: float | None = _option(
        "nim",
        default=120.0,
        gt=0,
        description="Seconds for one request to the NIM; None: no limit.",
    )
    deadline: float | None = _option(
        "nim",
        default=None,
        gt=0,
        description="Seconds for a whole call, with its batches and retries; None: no limit.",
    )
    max_retries: int = _option(
        "nim",
        default=5,
        ge=0,
        description="Retries of a request after 408, 429, 5xx or a broken connection. Stale "
        "keep-alive connections do not count.",
    )
    max_batch_size: int = _option(
        "nim", default=50, gt=0, description="The most inputs in one request to the NIM."
    )
    concurrency: int = _option(
        "nim",
        default=20,
        gt=0,
        description="The most requests in flight. A NIM queues 1,024 inputs, and 20 requests of "
        "50 inputs stay below that. Falls while the NIM replies 429 or 503.",
    )
    max_image_characters: int | None = _option(
        "nim",
        default=None,
        ge=4096,
        description="The most characters of an image in base64; larger images are reduced to the "
        "size of the model's tiles, then compressed as JPEG. None: 180,000 for NVIDIA's catalogue, "
        "which refuses more, and no limit for other servers.",
    )
    verify_ssl: bool | str = _option(
        "nim",
        default=True,
        description="Whether to verify the NIM's certificate, or a CA file or folder to trust.",
    )
    proxy: str | None = _secret(
        "nim",
        default=None,
        description="Proxy for the NIM. None: HTTPS_PROXY, ALL_PROXY and NO_PROXY apply to https "
        "addresses; http addresses use no proxy.",
    )
    user: str | None = _option(
        "nim", default=None, description="Value of the request's field `user`."
    )
    http_client_factory: Callable[[], Any] | None = _secret(
        "nim",
        default=None,
        description="Function that returns the httpx.AsyncClient to send with, for settings that "
        "the options above lack. A client belongs to one event loop and one process, so each "
        "engine creates its own and closes it.",
    )

    if not TYPE_CHECKING:  # it would hide the options from type checkers

        def __init__(self, /, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as exc:
                errors = [line.get("ctx", {}).get("error") for line in exc.errors()]
                for error in errors:
                    if isinstance(error, ConfigurationError):
                        raise error from None
                raise

    @model_validator(mode="wrap")
    @classmethod
    def _hide_input(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Leave what was given out of an error: it may be a key, in the wrong option even."""
        try:
            return handler(data)
        except ValidationError as exc:
            lines = [
                InitErrorDetails(
                    type=line["type"], loc=line["loc"], input=None, ctx=line.get("ctx", {})
                )
                for line in exc.errors(include_input=False, include_url=False)
            ]
            title = exc.title
        raise ValidationError.from_exception_data(title, lines, hide_input=True)

    @model_validator(mode="before")
    @classmethod
    def _nvidia_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for name in ("api_key", "base_url"):
            if (given := data.pop(f"nvidia_{name}", None)) is not None:
                data[name] = given
        for name in data.keys() - cls.model_fields.keys():
            if hint := _HINTS.get(name) or _find_similar(name, cls.model_fields):
                raise ValueError(f"there is no option {name}; {hint}")
        return data

    @field_validator("dimensions", mode="before")
    @classmethod
    def _zero_to_none(cls, value: Any) -> Any:
        return None if value == 0 else value  # the default of NVIDIA's adapter for LlamaIndex

    @field_validator("timeout", "deadline", mode="before")
    @classmethod
    def _refuse_zero(cls, value: Any) -> Any:
        if value == 0:
            raise ValueError("0 is no time at all; leave it out for the default, or give None")
        return value

    @field_validator("base_url", mode="before")
    @classmethod
    def _normalize_url(cls, value: Any) -> Any:
        return value if value is None else normalize_url(value)

    @field_validator("api_key")
    @classmethod
    def _strip_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        key = value.get_secret_value().strip()
        check_header("authorization", key, "api_key=")
        return SecretStr(key)

    @field_validator("default_headers")
    @classmethod
    def _strip_headers(cls, value: dict[str, str]) -> dict[str, str]:
        headers = {name: text.strip() for name, text in value.items()}
        for name, text in headers.items():
            check_header(name, text, "default_headers=")
        return headers

    @field_validator("http_client_factory", mode="before")
    @classmethod
    def _function(cls, value: Any) -> Any:
        if value is not None and (hasattr(value, "send") or not callable(value)):
            raise ValueError("give a function that makes the client: lambda: httpx.AsyncClient()")
        return value

    @classmethod
    def names_of(cls, *scopes: Scope) -> list[str]:
        """Return the names of the options of some scopes, in order."""
        return [name for name in Options.model_fields if _SCOPES[name] in scopes]

    def list_given(self, scope: Scope) -> list[str]:
        """Return the names of the options of a scope that are not as they are by default."""
        fields = Options.model_fields
        return [n for n in self.names_of(scope) if getattr(self, n) != fields[n].get_default()]

    def replace(self, **changes: Any) -> Options:
        """Return a checked copy with other values.

        Raises:
            pydantic.ValidationError: no such option, or not a value for it.
        """
        given = Options.model_fields.keys() & self.model_fields_set
        return Options(**{name: getattr(self, name) for name in given} | changes)

    @property
    def is_model_given(self) -> bool:
        """Whether a model was asked for; a NIM that serves another one is no answer then."""
        return "model" in self.model_fields_set

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        if state["__dict__"].get("api_key") is not None:
            state = {**state, "__dict__": {**state["__dict__"], "api_key": _NOT_PICKLED}}
        return state

    @field_validator("model", "checkpoint", "verify_ssl", mode="before")
    @classmethod
    def _path_to_str(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("truncate", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value


def _find_similar(name: object, names: Iterable[str]) -> str | None:
    from difflib import get_close_matches  # only a misspelt option needs it

    similar = get_close_matches(str(name), names, n=1)
    return f"did you mean {similar[0]}=?" if similar else None


_SCOPES: dict[str, Any] = {
    name: field.json_schema_extra["scope"]
    for name, field in Options.model_fields.items()
    if isinstance(field.json_schema_extra, dict)
}
