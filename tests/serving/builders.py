"""Tiny models, adapters and servers that the serving tests share."""

import asyncio
import contextlib
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from perennial.infra.artifacts import publish
from perennial.infra.errors import PerennialError, UnavailableError
from perennial.serving.engine import BASE, AdapterRef, ChatMessage, ChatRequest
from perennial.serving.recorder import Outcome, RecordedAnswer, RecorderHealth

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gguf_folder() -> Path:
    return next(Path(sys.prefix).rglob(GGUF)).parent


def save_tokenizer(folder: Path) -> None:
    AutoTokenizer.from_pretrained(str(gguf_folder()), gguf_file=GGUF).save_pretrained(folder)


def save_tiny_model(folder: Path, tokenizer: Path) -> Path:
    shutil.copytree(tokenizer, folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_smollm2(folder: Path, tokenizer: Path) -> Path:
    shutil.copytree(tokenizer, folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        str(gguf_folder()), gguf_file=GGUF, dtype=torch.float32
    )
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    fresh = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(config))
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.to(torch.float32).save_pretrained(folder)
    return folder


def save_adapter(model_dir: Path, folder: Path, *, seed: int, scale: float = 0.3) -> AdapterRef:
    """A random adapter that changes every answer; another seed, another answer."""

    def write(target: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
        config.base_model_name_or_path = None
        peft = get_peft_model(model, config)
        random = torch.Generator().manual_seed(seed)
        weights = {
            name.replace(".default", ""): torch.randn(value.shape, generator=random) * scale
            for name, value in peft.state_dict().items()
            if "lora_" in name
        }
        config.save_pretrained(target)
        save_file(weights, target / "adapter_model.safetensors")

    manifest = publish(folder, write)
    return AdapterRef(name=folder.name, path=folder, digest=manifest.digest)


def ask(text: str, **options: object) -> ChatRequest:
    return ChatRequest(messages=(ChatMessage(role="user", content=text),), **options)


@dataclass
class FakeSource:
    """A champion that a test can move, or break by giving it an error."""

    champions: dict[str, AdapterRef] = field(default_factory=dict)
    error: Exception | None = None

    def champion(self, task: str) -> AdapterRef:
        if self.error is not None:
            raise self.error
        return self.champions.get(task, BASE)


@dataclass
class ListRecorder:
    """Keeps answers in a list."""

    answers: list[RecordedAnswer] = field(default_factory=list)
    outcome: Outcome = Outcome.STORED

    def record(self, answer: RecordedAnswer) -> Outcome:
        self.answers.append(answer)
        return self.outcome

    def health(self) -> RecorderHealth:
        return RecorderHealth(
            num_stored=len(self.answers),
            num_spooled=0,
            num_refused=0,
            num_bytes_waiting=0,
            is_degraded=False,
        )


class FakeSink:
    """A store that can be down, slow or picky, and knows what it holds."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.error: PerennialError | Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, answer: RecordedAnswer) -> None:
        self.gate.wait(10)
        if self.error is not None:
            raise self.error
        if answer.id not in self.ids:
            self.ids.append(answer.id)


DOWN = UnavailableError("the store is down")


def wait_until(is_true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        threading.Event().wait(0.01)


@contextlib.contextmanager
def serving_http(app: object) -> Iterator[str]:
    """A real server on a free port; its base URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", lifespan="on")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(server.serve(sockets=[listener])), daemon=True
    )
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), 30)
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        listener.close()
