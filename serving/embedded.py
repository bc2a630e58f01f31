"""A small causal language model in this process: base once, adapters beside it.

The only serving module that knows torch, transformers and peft. Decodes one batch of rows with a
key-value cache; rows join and leave between two tokens. Queueing is `scheduler`'s. Adapters are
safetensors folders checked against their manifest; nothing is unpickled, nothing is downloaded.
"""

import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from perennial.infra.artifacts import verify
from perennial.infra.errors import (
    ConflictError,
    InputError,
    IntegrityError,
    ModelMissingError,
    NotFoundError,
)
from perennial.serving.engine import BASE, AdapterRef, ChatMessage
from perennial.serving.prompt import split_prompt
from perennial.serving.scheduler import BatchingEngine, Limits, RowStart

_log = logging.getLogger(__name__)
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_NEEDED_FILES = frozenset({_WEIGHTS, _CONFIG})
_LOAD_ERRORS = (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, OSError)

# Shapes: B rows, T tokens so far, V vocabulary.


def create_embedded_engine(
    model_dir: Path, *, num_threads: int = 0, limits: Limits | None = None
) -> BatchingEngine:
    """An engine over the model in `model_dir` (config, safetensors, tokenizer, chat template).

    `num_threads` 0 leaves torch's choice. Weights are fp32: bf16 is slower on most CPUs.

    Raises:
        ModelMissingError: the folder does not hold a model.
    """
    if num_threads:
        torch.set_num_threads(num_threads)
    return BatchingEngine(TorchDecoder(model_dir), limits or Limits())


@dataclass(kw_only=True, slots=True)
class _Row:
    temperature: float
    top_p: float
    generator: torch.Generator
    token: int = -1  # the newest, which the next step reads


class TorchDecoder:
    """The `Decoder` over one transformers model; see `scheduler.Decoder` for the threads."""

    def __init__(self, model_dir: Path) -> None:
        self._tokenizer, self._model = _open_model(model_dir)
        self._plain = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True  # "<|im_end|>" in a message is just characters
        controls = self._tokenizer.added_tokens_decoder
        self._controls = {str(token.content): int(i) for i, token in controls.items()}
        self._adapters: dict[str, AdapterRef] = {}
        self._peft: Any = None  # peft's wrapper, made with the first adapter; vendor type
        self._active: str | None = None
        self._rows: list[_Row] = []
        self._cache = DynamicCache()
        self._mask_BT = torch.zeros((0, 0), dtype=torch.long)
        self.end_ids = _end_ids(self._tokenizer, self._model)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the adapters in memory."""
        return tuple(self._adapters)

    def encode(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """The prompt's ids; text of messages never becomes a control token."""
        nonce = secrets.token_hex(8)
        ids: list[int] = []
        for piece in split_prompt(messages, self._render, tuple(self._controls), nonce):
            if piece.is_control:
                ids.append(self._controls[piece.text])
            else:
                ids.extend(self._plain.encode(piece.text, add_special_tokens=False).ids)
        return tuple(ids)

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of answer tokens, control tokens left out."""
        return str(self._plain.decode(list(ids), skip_special_tokens=True))

    def load(self, adapter: AdapterRef) -> None:
        """Check, load and try an adapter; on failure the model is as before."""
        known = self._adapters.get(adapter.name)
        if known is not None:
            if known.digest != adapter.digest:
                raise ConflictError(
                    f"{adapter.name} is loaded with another digest; names are final"
                )
            return
        folder = _checked_folder(adapter)
        key = _key(adapter.name)
        try:
            self._attach(folder, key)
            self._adapters[adapter.name] = adapter
            self._try_out(adapter.name)
        except _LOAD_ERRORS as error:
            self._detach(adapter.name)
            raise IntegrityError(f"adapter {adapter.name} does not load: {error}") from error
        _log.info("adapter loaded name=%s digest=%s", adapter.name, adapter.digest)

    def unload(self, name: str) -> None:
        """Drop an adapter; an unknown name is no error, one that is answering is."""
        if self._rows and name == self._active:
            raise ConflictError(f"adapter {name} is answering a request")
        if name in self._adapters:
            self._detach(name)
            _log.info("adapter unloaded name=%s", name)

    @torch.inference_mode()
    def admit(self, adapter: str, starts: Sequence[RowStart]) -> tuple[int, ...]:
        """Read the new rows' prompts and join them to the batch; their first tokens."""
        self._activate(adapter)
        width = max(len(s.prompt_ids) for s in starts)
        # Left padding: the newest token of every row is in the last column. The mask, never the
        # pad id, says what is padding: here the pad id equals the end id.
        ids_BT = torch.tensor([[0] * (width - len(s.prompt_ids)) + [*s.prompt_ids] for s in starts])
        mask_BT = torch.tensor(
            [[0] * (width - len(s.prompt_ids)) + [1] * len(s.prompt_ids) for s in starts]
        )
        cache = DynamicCache()
        logits_BV = self._forward(ids_BT, mask_BT, cache)
        rows = [_row(start) for start in starts]
        tokens = _choose(logits_BV, rows)
        self._join(rows, cache, mask_BT)
        return tokens

    @torch.inference_mode()
    def step(self) -> tuple[int, ...]:
        """The next token of every row, in order."""
        ids_BT = torch.tensor([[row.token] for row in self._rows])
        self._mask_BT = functional.pad(self._mask_BT, (0, 1), value=1)
        return _choose(self._forward(ids_BT, self._mask_BT, self._cache), self._rows)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, without columns that are padding in all of them."""
        self._rows = [self._rows[i] for i in rows]
        if not rows:
            self._cache = DynamicCache()
            self._mask_BT = torch.zeros((0, 0), dtype=torch.long)
            return
        mask_BT = self._mask_BT[list(rows)]
        start = int(mask_BT.any(0).int().argmax())
        self._mask_BT = mask_BT[:, start:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[list(rows), :, start:]
            layer.values = layer.values[list(rows), :, start:]

    def _render(self, turns: list[dict[str, str]]) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the model's chat template refuses this: {error}") from error

    def _forward(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        output = self._model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: torch.Tensor = output.logits[:, -1].float()
        return logits_BV

    def _join(self, rows: list[_Row], cache: DynamicCache, mask_BT: torch.Tensor) -> None:
        if not self._rows:
            self._rows, self._cache, self._mask_BT = rows, cache, mask_BT
            return
        width = max(self._mask_BT.shape[1], mask_BT.shape[1])
        for old, new in zip(self._cache.layers, cache.layers, strict=True):
            old.keys = torch.cat([_widen(old.keys, width), _widen(new.keys, width)])
            old.values = torch.cat([_widen(old.values, width), _widen(new.values, width)])
        self._mask_BT = torch.cat(
            [functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask_BT, mask_BT)]
        )
        self._rows = [*self._rows, *rows]

    def _activate(self, name: str) -> None:
        if name != BASE.name and name not in self._adapters:
            raise NotFoundError(f"adapter {name} is not loaded")
        if name == self._active:
            return
        if name != BASE.name:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(_key(name))
        elif self._peft is not None:
            self._peft.base_model.disable_adapter_layers()
        self._active = name

    def _attach(self, folder: Path, key: str) -> None:
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        if self._peft is None:
            self._peft = PeftModel(self._model, config, adapter_name=key)
        result = self._peft.load_adapter(str(folder), adapter_name=key, torch_device="cpu")
        self._peft.eval()
        odd = [k for k in result.missing_keys if "lora_" in k and f".{key}." in k]
        odd.extend(result.unexpected_keys)
        if odd:
            raise ValueError(f"weights do not match this model, first: {odd[0]}")

    @torch.inference_mode()
    def _try_out(self, name: str) -> None:
        """Raise unless the adapter answers one token with finite numbers."""
        serving = self._active
        self._active = None  # loading changed what peft has active
        try:
            self._activate(name)
            ids_BT = torch.tensor([self.encode([ChatMessage(role="user", content="Hello")])])
            logits_BV = self._forward(ids_BT, torch.ones_like(ids_BT), DynamicCache())
            if not bool(torch.isfinite(logits_BV).all()):
                raise ValueError("its answer is not a number")
        finally:
            if serving is not None:
                self._activate(serving)

    def _detach(self, name: str) -> None:
        """Remove what there is of an adapter and put the running one back."""
        serving, self._active = self._active, None
        self._adapters.pop(name, None)
        if self._peft is not None and _key(name) in self._peft.peft_config:
            if self._adapters:  # peft must not choose the next active adapter itself
                self._peft.set_adapter(_key(next(iter(self._adapters))))
            self._peft.delete_adapter(_key(name))
        if serving is not None and serving != name:
            self._activate(serving)


def _open_model(model_dir: Path) -> tuple[Any, Any]:  # Any: transformers has no types
    if not (model_dir / "config.json").is_file():
        raise ModelMissingError(f"there is no model in {model_dir}: config.json is missing")
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    if tokenizer.chat_template is None:
        raise ModelMissingError(f"the tokenizer in {model_dir} has no chat template")
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    return tokenizer, model.eval()


def _end_ids(tokenizer: Any, model: Any) -> frozenset[int]:  # Any: transformers has no types
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)


def _checked_folder(adapter: AdapterRef) -> Path:
    """The folder of `adapter`, after its files were found to be what they should be."""
    if adapter.path is None or not adapter.path.is_dir():
        raise ModelMissingError(f"adapter {adapter.name} has no folder {adapter.path}")
    manifest = verify(adapter.path)
    if adapter.digest is None or manifest.digest != adapter.digest:
        raise IntegrityError(
            f"adapter {adapter.name} in {adapter.path} has digest {manifest.digest}, "
            f"promoted was {adapter.digest}"
        )
    if not _NEEDED_FILES.issubset(manifest.files):
        raise IntegrityError(f"{adapter.path} must hold {_WEIGHTS} and {_CONFIG}")
    pickles = [f for f in manifest.files if not f.endswith((".json", ".safetensors", ".md"))]
    if pickles:
        raise IntegrityError(
            f"{adapter.path} must hold safetensors and JSON only, has {pickles[0]}"
        )
    try:
        kind = json.loads((adapter.path / _CONFIG).read_bytes()).get("peft_type")
    except (ValueError, AttributeError) as error:
        raise IntegrityError(f"{adapter.path / _CONFIG} is not a JSON object: {error}") from error
    if kind != "LORA":
        raise IntegrityError(f"{adapter.path / _CONFIG} must be of peft_type LORA, is {kind}")
    return adapter.path


def _key(name: str) -> str:
    """The name as a torch module key, which must not hold dots; hex, so no two names meet."""
    return "a" + name.encode().hex()


def _row(start: RowStart) -> _Row:
    generator = torch.Generator()
    if start.seed is None:
        generator.seed()
    else:
        generator.manual_seed(start.seed & (1 << 63) - 1)
    return _Row(temperature=start.temperature, top_p=start.top_p, generator=generator)


def _choose(logits_BV: torch.Tensor, rows: Sequence[_Row]) -> tuple[int, ...]:
    """One token per row, noted in the row; temperature 0 takes the likeliest."""
    best_B = logits_BV.argmax(-1).tolist()
    for i, row in enumerate(rows):
        row.token = best_B[i] if row.temperature == 0 else _sample(logits_BV[i], row)
    return tuple(row.token for row in rows)


def _sample(logits_V: torch.Tensor, row: _Row) -> int:
    """A token of the nucleus (Holtzman et al. 2020): the fewest that hold `top_p` together."""
    probs_V, order_V = (logits_V / row.temperature).softmax(-1).sort(descending=True)
    probs_V[probs_V.cumsum(-1) - probs_V >= row.top_p] = 0
    return int(order_V[torch.multinomial(probs_V, 1, generator=row.generator)])


def _widen(states: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values (B, heads, T, size) with zeros in front up to T = `width`."""
    return functional.pad(states, (0, 0, width - states.shape[2], 0))
