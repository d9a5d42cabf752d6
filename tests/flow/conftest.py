"""What the flow tests share."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fastapi.testclient import TestClient
from server_world import KEY

from hyperbagel.model.student import Sampler, Student, make_adapter, save_student
from hyperbagel.pipeline import HyperBagel
from hyperbagel.serve.app import create_app
from hyperbagel.serve.run import bind, make_server

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"stride": 16, "min_size": 32, "max_size": 32, "max_pixels": 1024}


def tiny_folder(parent: Path) -> Path:
    """A copy of the tiny golden model with picture sizes to its measure: it was made for 32-pixel pictures but says BAGEL's own sizes."""
    spec = importlib.util.spec_from_file_location("golden_archive", GOLDEN / "archive.py")
    assert spec is not None and spec.loader is not None
    archive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(archive)
    folder = parent / "tiny"
    shutil.copytree(archive.TINY, folder)
    config = folder / "bagel_config.json"
    options = json.loads(config.read_text("utf-8"))
    options |= {"default_size": [32, 32], "vae_transform": SMALL, "vit_transform": SMALL | {"stride": 14, "min_size": 28, "max_size": 28}}
    config.write_text(json.dumps(options), "utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder."""
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> HyperBagel:
    """The tiny model and a student, changed at random."""
    folder = tiny_folder(tmp_path_factory.mktemp("model"))
    model = HyperBagel.from_pretrained(folder, device="cpu")
    torch.manual_seed(0)
    student = Student.fresh(model.parts.model, make_adapter(model.parts.model, "lora", rank=4), Sampler(nfe=6))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    (folder / "students").mkdir()
    save_student(folder / "students" / "6", student, model.parts.model)
    return model


@pytest.fixture(scope="module")
def app(model: HyperBagel) -> Any:
    return create_app(model, api_key=KEY)


@pytest.fixture(scope="module")
def client(app: Any) -> Iterator[openai.OpenAI]:
    """The official client, in process."""
    with TestClient(app, base_url="http://testserver") as http:
        yield openai.OpenAI(api_key=KEY, base_url="http://testserver/v1", http_client=http, max_retries=0)


@contextmanager
def _serving(app: Any) -> Iterator[str]:
    listener, server = bind("127.0.0.1", 0), make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive(), "the server did not start"
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive(), "clients that are still connected do not keep the server from ending"


@pytest.fixture(scope="session")
def serving() -> Callable[[Any], AbstractContextManager[str]]:
    """Serves an app on a loopback socket: `with serving(app) as address`."""
    return _serving
