"""Every option, defined once; the adapters inherit them.

`EngineOptions` has what all models share, `Options` adds that of embeddings and `RerankOptions`
that of rerankers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

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

from shared_engine.catalogue import DEFAULT_MODELS, Task
from shared_engine.documents import Role
from shared_engine.endpoints import check_header, normalize_url
from shared_engine.errors import ConfigurationError
from shared_engine.vectors import EmbeddingType

DType = Literal["auto", "float32", "bfloat16", "float16"]
Truncate = Literal["NONE", "START", "END"]
RerankTruncate = Literal["NONE", "END"]
Activation = Literal["none", "sigmoid"]

Scope = Literal["routing", "engine", "local", "nim", "request"]
"""The part that an option configures: the choice of the backend, any backend, the local one, the
client of a NIM, or the request. Objects whose options differ in "request" alone share a backend."""

_HINTS = {
    "batch_size": "use max_batch_size= (NIM requests) or max_batch_tokens= (local batches)",
    "infer_path": "use base_url=, the root of the server or its /v1",
    "input_type": "call the method for queries or the one for documents",
    "max_length": "use max_tokens=",
    "mode": "use base_url= or backend=",
    "nvidia_api_base": "use base_url=",
    "organization": "use default_headers=",
    "usage_telemetry_enabled": "no usage is reported; omit it",
}
"""Replacements for options of NVIDIA's and other adapters."""
_NOT_PICKLED = SecretStr("")
"""Replaces a key in a pickle: the process that loads it reads NVIDIA_API_KEY."""


def _option(scope: Scope, **field: Any) -> Any:
    return Field(json_schema_extra={"scope": scope}, **field)


def _secret(scope: Scope, **field: Any) -> Any:
    return _option(scope, repr=False, exclude=True, **field)


class EngineOptions(BaseModel):
    """Which model to use and where it runs. Unknown options are errors.

    The backend is a NIM with `base_url`, NVIDIA's hosted catalogue with `api_key` alone, and
    otherwise this process; `backend` selects it explicitly. NVIDIA_BASE_URL is the default address;
    any local option, such as `device` or a folder as `model`, takes precedence over it.
    `nvidia_api_key` and `nvidia_base_url` are aliases and take precedence over `api_key` and
    `base_url`.

    The key, the headers and the proxy are in no repr and no dump. A pickle contains no key (the
    process that loads it reads NVIDIA_API_KEY), but it contains headers and proxy.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), hide_input_in_errors=True)

    task: ClassVar[Task]
    """Result of the model: vectors or scores."""

    model: str | None = Field(
        default=None,
        kw_only=False,  # a type checker reads this in a direct call of Field only
        min_length=1,
        json_schema_extra={"scope": "engine"},
        description="Name or alias of a model in the catalogue, a Hugging Face id, or a folder. "
        f"None: {DEFAULT_MODELS['embed']} in this process, and the only model of a NIM.",
    )
    checkpoint: str | None = _option(
        "local",
        default=None,
        description="Local folder or Hugging Face id of the weights. None: those of the model.",
    )
    revision: str | None = _option(
        "local",
        default=None,
        description="Branch, tag or commit of the Hugging Face repository. None: the catalogue's "
        "commit, or the main branch.",
    )
    device: str = _option(
        "local",
        default="auto",
        description='"cpu", "cuda" or "cuda:1"; "cuda:0,cuda:1" shares one queue between two GPUs. '
        "auto: a CUDA GPU if available, else the CPU.",
    )
    dtype: DType = _option(
        "local",
        default="auto",
        description="Number type of the weights. auto: bfloat16 if the device supports it "
        "natively, else float32, or float16 on older GPUs.",
    )
    truncate: Truncate = _option(
        "request",
        default="NONE",
        description="Treatment of texts over the token limit: an error (NONE), or the START or "
        "END is cut off.",
    )
    max_tokens: int | None = _option(
        "local",
        default=None,
        gt=0,
        description="Token limit of an input, prefix and BOS included. None: the model's limit.",
    )
    max_tiles: int | None = _option(
        "local",
        default=None,
        gt=0,
        le=12,
        description="Maximum number of tiles of an image, in addition to a thumbnail; more tiles "
        "show more detail and take longer. Refused for Nemotron-3.5, which does not cut images. "
        "None: the checkpoint's value.",
    )
    allow_image_urls: bool = _option(
        "engine",
        default=False,
        description="Allow images by http or https URL, from public addresses only.",
    )
    max_batch_tokens: int | None = _option(
        "local",
        default=None,
        gt=0,
        description="Maximum number of tokens in one forward pass. None: chosen for the device.",
    )
    show_progress: bool = _option("request", default=False, description="Show a progress bar.")

    backend: Literal["auto", "local", "nim"] = _option(
        "routing",
        default="auto",
        description="Backend: this process (local) or a NIM. auto: chosen by the other options.",
    )
    base_url: str | None = _option(
        "routing",
        default=None,
        description="Address of a NIM, its root or /v1: http://localhost:8000/v1. Replicas need a "
        "load balancer with one address. None: NVIDIA_BASE_URL, unless a local option is given.",
    )
    api_key: SecretStr | str | None = _secret(
        "routing",
        default=None,
        description="Key for the NIM or the catalogue. None: NVIDIA_API_KEY.",
    )
    allow_insecure_key: bool = _option(
        "nim",
        default=False,
        description="Send the key unencrypted over http to a public host.",
    )
    default_headers: dict[str, str] = _secret(
        "nim", default_factory=dict, description="Headers added to each request to the NIM."
    )
    timeout: float | None = _option(
        "nim",
        default=120.0,
        gt=0,
        description="Seconds per request to the NIM. None: no limit.",
    )
    deadline: float | None = _option(
        "nim",
        default=None,
        gt=0,
        description="Seconds for one call, all its requests and retries included. None: no limit.",
    )
    max_retries: int = _option(
        "nim",
        default=5,
        ge=0,
        description="Retries of a request after 408, 429, 5xx or a broken connection. Stale "
        "keep-alive connections do not count.",
    )
    max_batch_size: int = _option(
        "nim", default=50, gt=0, description="Maximum number of inputs per request to the NIM."
    )
    concurrency: int = _option(
        "nim",
        default=20,
        gt=0,
        description="Maximum number of requests in flight. 20 requests of 50 inputs fill the queue "
        "of a NIM, which holds 1,024 inputs. Lower while the NIM replies 429 or 503.",
    )
    max_image_characters: int | None = _option(
        "nim",
        default=None,
        ge=4096,
        description="Maximum number of base64 characters of an image; a larger one is scaled "
        "down to the size of the model's tiles, then compressed as JPEG. None: 180,000 for "
        "NVIDIA's catalogue, which refuses more; no limit for other servers.",
    )
    verify_ssl: bool | str = _option(
        "nim",
        default=True,
        description="Verify the NIM's certificate; or a CA file or folder to trust.",
    )
    proxy: str | None = _secret(
        "nim",
        default=None,
        description="Proxy for the NIM. None: HTTPS_PROXY, ALL_PROXY and NO_PROXY apply to https "
        "addresses, and http addresses use no proxy.",
    )
    user: str | None = _option(
        "nim", default=None, description="Value of the field `user` of each request."
    )
    http_client_factory: Callable[[], Any] | None = _secret(
        "nim",
        default=None,
        description="Function that returns an httpx.AsyncClient, for settings that have no option. "
        "Each engine calls it in its own event loop and closes the client.",
    )

    if not TYPE_CHECKING:  # it would hide the options from type checkers

        def __init__(self, model: str | Path | None = None, /, **data: Any) -> None:
            if model is not None:
                if "model" in data:
                    raise TypeError("model is given twice: by position and as model=")
                data["model"] = model
            try:
                super().__init__(**data)
            except ValidationError as exc:
                errors = [line.get("ctx", {}).get("error") for line in exc.errors()]
                for error in errors:
                    if isinstance(error, ConfigurationError):
                        raise error from None
                raise

        def __setattr__(self, name: str, value: Any) -> None:
            if name in self.names_of():  # a loaded engine cannot change
                raise ConfigurationError(
                    f"{name}= cannot change; copy the object with another value: "
                    f"model_copy(update={{{name!r}: ...}})"
                )
            super().__setattr__(name, value)

    @model_validator(mode="wrap")
    @classmethod
    def _hide_input(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Remove the values from an error: one may be a key, even in the wrong option."""
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
        for name, value in data.items():
            if name != "api_key" and isinstance(value, str) and value.strip().startswith("nvapi-"):
                raise ConfigurationError(f"{name}= is an API key; pass it as api_key=")
        for name in data.keys() - cls.model_fields.keys():
            if hint := _HINTS.get(name) or _find_similar(name, cls.model_fields):
                raise ValueError(f"unknown option {name}=; {hint}")
        return data

    @field_validator("timeout", "deadline", mode="before")
    @classmethod
    def _refuse_zero(cls, value: Any) -> Any:
        if value == 0:
            raise ValueError("must be greater than 0; use None for no limit")
        return value

    @field_validator("base_url", mode="before")
    @classmethod
    def _normalize_url(cls, value: Any) -> Any:
        return value if value is None else normalize_url(value)

    @field_validator("api_key", mode="before")
    @classmethod
    def _strip_key(cls, value: Any) -> SecretStr | None:
        if value is None:
            return None
        key = value.get_secret_value() if isinstance(value, SecretStr) else value
        if not isinstance(key, str):
            raise ValueError("expected a str or a SecretStr")
        key = key.strip()
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
            raise ValueError(
                "expected a function that returns a client: lambda: httpx.AsyncClient()"
            )
        return value

    @classmethod
    def of(cls, given: Self | str | Path | None) -> Self:
        """Return options unchanged, those of a model by its name or folder, or the defaults.

        Raises:
            ConfigurationError: something else was given.
        """
        if given is None:
            return cls()
        if isinstance(given, str | Path):
            return cls(model=given)  # type: ignore[arg-type]  # a validator takes paths
        if not isinstance(given, cls):
            raise ConfigurationError(
                f"expected {cls.__name__}(...) or the name of a model, got one "
                f"{type(given).__name__}"
            )
        return given

    @classmethod
    def names_of(cls, *scopes: Scope) -> list[str]:
        """Return the names of the options of some scopes, or of all, in order.

        A framework's own fields in an adapter have no scope.
        """
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        found = {n: extra["scope"] for n, extra in extras.items() if isinstance(extra, dict)}
        return [name for name, scope in found.items() if not scopes or scope in scopes]

    def list_given(self, scope: Scope) -> list[str]:
        """Return the names of the options of a scope that differ from their default."""
        fields = type(self).model_fields
        return [n for n in self.names_of(scope) if getattr(self, n) != fields[n].get_default()]

    @abstractmethod
    def replace(self, **changes: Any) -> EngineOptions:
        """Return validated options with other values, without a framework's fields.

        Raises:
            pydantic.ValidationError: an unknown option, or an invalid value.
        """

    def _merge(self, changes: dict[str, Any]) -> dict[str, Any]:
        given = self.model_fields_set.intersection(self.names_of())
        return {name: getattr(self, name) for name in given} | changes

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy with other values, which are validated; pydantic alone would take any.

        Raises:
            pydantic.ValidationError: an unknown option, or an invalid value.
        """
        changes = dict(update or {})
        foreign = type(self).model_fields.keys() - {*self.names_of()}  # of a framework
        if own := {name: changes.pop(name) for name in changes.keys() - foreign}:
            valid = self.replace(**own)
            changes |= {name: getattr(valid, name) for name in valid.model_fields_set}
        return super().model_copy(update=changes, deep=deep)

    @property
    def local_model(self) -> str:
        """Name of the model in this process: the given one, or the default of the task."""
        return self.model or DEFAULT_MODELS[self.task]

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


class Options(EngineOptions):
    """The options of an embedding model."""

    task = "embed"

    dimensions: int | None = _option(
        "request",
        default=None,
        gt=0,
        description="Length of a vector. None: the model's full size.",
    )
    embedding_type: EmbeddingType = _option(
        "request", default="float", description="Number type of a vector's values."
    )
    prefixes: Literal["auto", "server"] | dict[Role, str] = _option(
        "nim",
        default="auto",
        description="Prefixes of texts. auto: the server adds them if `input_type` has an effect "
        "there; otherwise the client adds the model's own. server: the server adds them. A dict "
        'such as {"query": "query: ", "document": "passage: "}: the client adds these and sends no '
        "`input_type`; empty texts for a model without roles.",
    )

    @field_validator("prefixes")
    @classmethod
    def _require_both(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) < len(get_args(Role)):
            raise ValueError(f"expected a prefix for each of {', '.join(get_args(Role))}")
        return value

    @field_validator("dimensions", mode="before")
    @classmethod
    def _zero_to_none(cls, value: Any) -> Any:
        return None if value == 0 else value  # the default of NVIDIA's adapter for LlamaIndex

    def replace(self, **changes: Any) -> Options:
        """See `EngineOptions.replace`."""
        return Options(**self._merge(changes))


class RerankOptions(EngineOptions):
    """The options of a reranker."""

    task = "rerank"

    model: str | None = Field(
        default=None,
        kw_only=False,
        min_length=1,
        json_schema_extra={"scope": "engine"},
        description="Name or alias of a reranker in the catalogue, a Hugging Face id, or a folder. "
        f"None: {DEFAULT_MODELS['rerank']} in this process, and the only model of a server.",
    )
    truncate: RerankTruncate = _option(
        "request",
        default="NONE",
        description="Treatment of documents over the token limit: an error (NONE), or the END is "
        "cut off.",
    )
    activation: Activation = _option(
        "request",
        default="none",
        description="none: scores are logits, of any size. sigmoid: scores are from 0 to 1.",
    )
    vision_cache_bytes: int = _option(
        "local",
        default=2**28,
        ge=0,
        description="Device memory for the encoded images of recent documents, which do not depend "
        "on the query: 7 MB for a page of 7 tiles in 16 bits. 0: none.",
    )
    max_batch_size: int = _option(
        "nim",
        default=32,
        gt=0,
        le=512,
        description="Maximum number of documents per request to the NIM, which takes up to 512.",
    )

    def replace(self, **changes: Any) -> RerankOptions:
        """See `EngineOptions.replace`."""
        return RerankOptions(**self._merge(changes))


def _find_similar(name: object, names: Iterable[str]) -> str | None:
    from difflib import get_close_matches  # imported only for a misspelt option

    similar = get_close_matches(str(name), names, n=1)
    return f"did you mean {similar[0]}=?" if similar else None
