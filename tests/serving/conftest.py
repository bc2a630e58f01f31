from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from perennial.serving.embedded import create_embedded_engine
from perennial.serving.engine import AdapterRef
from perennial.serving.scheduler import BatchingEngine, Limits
from tests.serving import builders


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    builders.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    torch.set_num_threads(1)
    return builders.save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", tokenizer_dir)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> list[AdapterRef]:
    root = tmp_path_factory.mktemp("adapters")
    return [builders.save_adapter(tiny_dir, root / f"support-v{i}-abc", seed=i) for i in (1, 2, 3)]


@pytest.fixture
def engine(tiny_dir: Path) -> Iterator[BatchingEngine]:
    made = create_embedded_engine(tiny_dir, num_threads=1, limits=Limits(default_answer_tokens=12))
    yield made
    made.close()


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return builders.save_smollm2(tmp_path_factory.mktemp("smollm2") / "model", tokenizer_dir)
