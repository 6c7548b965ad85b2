"""The model card that stands beside saved weights, and what goes to the hub."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sae_kernels import nn
from sae_kernels.nn.card import MARK, card

ARCHITECTURES = [
    nn.TopKConfig(8, 32, k=4),
    nn.JumpReLUConfig(8, 32, d_out=6, skip=True, subtract_b_dec=False),
    nn.BatchTopKConfig(8, 32, k=4, n_layers=2),
    nn.SwitchConfig(8, 32, k=4, n_experts=4),
]


def front_matter(text: str) -> dict[str, Any]:
    start, middle, _ = text.split("---\n", 2)
    assert start == ""
    values = yaml.safe_load(middle)
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.architecture)
def test_a_card_says_what_it_is_and_how_to_load_it(config: nn.SAEConfig, tmp_path: Path) -> None:
    nn.build(config).save_pretrained(tmp_path / "my-sae")
    text = (tmp_path / "my-sae" / "README.md").read_text()
    assert front_matter(text) == {
        "library_name": "sae_kernels",
        "tags": ["sparse-autoencoder", config.architecture],
    }
    assert f"# {config.architecture} " in text
    assert "8 to 32 latents" in text
    assert "sk.load('my-sae')" in text
    assert "## Figures" not in text, "nothing was measured"
    assert ("decode(codes, x)" in text) == config.skip


def test_figures_provenance_and_licence() -> None:
    sae = nn.TopKSAE(8, 32, k=4)
    trained = {"tokens": 1_000_000, "steps": 500, "fvu": 0.123456, "l0": 4.0, "dead_fraction": 0.5}
    model = {"name": "gpt2", "layer": "h.3"}
    sae.metadata = {"trained": trained, "model": model, "license": "apache-2.0", "none": None}
    text = card(sae)
    assert front_matter(text)["license"] == "apache-2.0"
    for row in ("| steps | 500 |", "| model.name | gpt2 |", "| tokens of training | 1,000,000 |"):
        assert row in text
    assert "0.1235" in text
    assert "none" not in text


HOSTILE = {
    "html": "<script>alert(1)</script>",
    "table": "a | b\n| c | d |",
    "front-matter": "\n---\nlicense: mine\n---\n",
    "link": "[press](https://example.com) ![see](https://example.com/a.png)",
    "code": "```\nrm -rf /\n```",
    "terminal": "\x1b[2J\x07\u202e",
    "long": "x" * 100_000,
    "deep": {"a": {"b": {"c": ["<b>", {"d": "|"}] * 500}}},
    "number": 10**400,
    "keys": {f"<i>{n}|\n": n for n in range(1000)},
    "words": ["trained", "x"],
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("key", ["model_name", "trained", "license", "<b>|\n# k"])
def test_a_strangers_metadata_stay_text(name: str, key: str) -> None:
    sae = nn.TopKSAE(8, 32, k=4)
    plain = card(sae)
    sae.metadata = {key: HOSTILE[name]}
    text = card(sae)
    assert front_matter(text) == front_matter(plain)
    assert len(text) < 20_000
    body = text.split("---\n", 2)[2].replace(MARK, "")
    outside = body.split("```python")[0]
    assert "<" not in outside
    assert "```" not in outside
    assert not re.search(r"(?<!\\)\]\(", outside)
    assert "://" not in outside
    assert all(character.isprintable() or character == "\n" for character in text)
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert len(headings) <= 5
    for line in outside.splitlines():  # a row has two cells
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 3, line


def test_a_readme_of_somebody_else_stays(tmp_path: Path) -> None:
    sae = nn.TopKSAE(8, 32, k=4)
    readme = tmp_path / "README.md"
    readme.write_text("# My project\n")
    sae.save_pretrained(tmp_path)
    assert readme.read_text() == "# My project\n"
    readme.write_bytes(b"\xff\xfe")
    sae.save_pretrained(tmp_path)
    assert readme.read_bytes() == b"\xff\xfe"
    readme.unlink()
    sae.save_pretrained(tmp_path)
    assert MARK in readme.read_text()
    sae.metadata = {"model_name": "gpt2"}
    sae.save_pretrained(tmp_path)
    assert "gpt2" in readme.read_text(), "a card of ours is written anew"


class Hub:
    """The hub's client: what it was told, and the files as they were then."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repository: str, **options: Any) -> None:
        self.told.append((f"create_repo {repository}", options))

    def create_branch(self, repository: str, **options: Any) -> None:
        self.told.append((f"create_branch {repository}", options))

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> Any:
        self.told.append((f"upload_folder {repo_id}", options))
        self.files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url="https://hub/commit")


@pytest.mark.parametrize("revision", [None, "v2"])
def test_pushing_uploads_what_saving_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    hub, tokens = Hub(), []

    def client(token: str | None = None) -> Hub:
        tokens.append(token)
        return hub

    monkeypatch.setattr("huggingface_hub.HfApi", client)
    sae = nn.TopKSAE(8, 32, k=4, activation_scale=3.0)
    options: dict[str, Any] = {"private": True, "token": "secret", "revision": revision}
    assert sae.push_to_hub("me/sae", **options, commit_message="first") == "https://hub/commit"
    assert tokens == ["secret"]
    branch = [("create_branch me/sae", {"branch": "v2", "exist_ok": True})] if revision else []
    assert hub.told == [
        ("create_repo me/sae", {"private": True, "exist_ok": True}),
        *branch,
        ("upload_folder me/sae", {"revision": revision, "commit_message": "first"}),
    ]
    sae.save_pretrained(tmp_path / "sae")
    saved = {p.name: p.read_bytes() for p in (tmp_path / "sae").iterdir()}
    card_there, card_here = hub.files.pop("README.md"), saved.pop("README.md")
    assert hub.files == saved
    assert card_there == card_here.replace(b"sk.load('sae')", b"sk.load('me/sae')")
