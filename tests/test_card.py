"""Publishing against a stand-in for the hub: what is sent, what is asked before, and what is refused."""
import os

import pandas as pd
import pytest
from huggingface_hub import constants
from servers.hub_upload import Upload

from domain_adapt.card import Parcel, markdown, publish
from domain_adapt.models import files_hash
from domain_adapt.params import UserError

@pytest.fixture
def folder(tmp_path):
    "A merge's folder, with things that must stay at home."
    at = tmp_path / "linear-0.5"
    at.mkdir()
    for name, data in {"config.json": b"{}", "model.safetensors": os.urandom(70_000), "README.md": b"# The first card\n", "modeling_x.py": b"raise SystemExit",
                       ".env": b"SECRET=1"}.items(): (at / name).write_bytes(data)
    return at


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Upload() as server:
        for name, value in dict(ENDPOINT=server.endpoint, HF_HUB_DISABLE_XET=True, HF_HUB_OFFLINE=False, HF_TOKEN_PATH=str(tmp_path / "token")).items():
            monkeypatch.setattr(constants, name, value)
        yield server


@pytest.fixture
def send(monkeypatch, folder, hub):
    "A function that publishes the folder; gives the address, and what was shown before."
    def call(repo="jo/model", public=False, answer=True, token="hf_right"):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
        parcel, shown = Parcel("linear-0.5", folder, ("config.json", "model.safetensors", "README.md"), "# The card\n"), []
        return publish(parcel, repo, public, lambda text: shown.append(text) or answer), "".join(shown)
    return call


@pytest.mark.server
class TestPublish:
    def test_files_arrive_whole_and_private_with_the_parcels_card(self, hub, folder, send):
        address, shown = send()
        assert hub.repositories == {"jo/model": {"config.json": b"{}", "README.md": b"# The card\n",
                                                 "model.safetensors": (folder / "model.safetensors").read_bytes()}}
        assert hub.private == {"jo/model"} and "70,000  model.safetensors" in shown and address == f"{hub.endpoint}/jo/model" and address in shown
        assert "hf_right" not in shown

    def test_no_means_that_nothing_is_written(self, hub, send):
        assert send(answer=False)[0] is None
        assert hub.repositories == {} and not hub.written()

    def test_public_is_said_in_capitals(self, hub, send):
        assert "PUBLIC" in send(repo=None, public=True)[1] and list(hub.repositories) == ["jo/linear-0.5"] and not hub.private

    def test_a_repository_that_is_there_is_said_to_be(self, hub, send):
        hub.repositories["jo/model"] = {"other": b"x", "config.json": b"old"}
        assert "is there already" in send()[1] and hub.repositories["jo/model"]["config.json"] == b"{}" and hub.repositories["jo/model"]["other"] == b"x"

    @pytest.mark.parametrize("token, said", [("hf_wrong", "401"), (None, "hf auth login")])
    def test_without_the_right_token_nothing_happens(self, hub, send, token, said):
        with pytest.raises(UserError, match="publish:") as e: send(token=token)
        assert said in str(e.value) and not hub.written() and "hf_wrong" not in str(e.value)

    def test_what_the_hub_refuses_is_said(self, hub, send):
        hub.fail["/commit/"] = 403
        with pytest.raises(UserError, match="publish: .*403"): send()
        assert hub.repositories["jo/model"] == {}


def test_tables_keep_what_stands_in_a_cell():
    text = markdown(pd.DataFrame({"what": ["a|b\nc", "<img src=x>"], "n": [1, 2]}))
    assert len(text.splitlines()) == 4 and "a\\|b c" in text and "&lt;img" in text


def test_a_hash_changes_with_names_and_contents():
    one = {"a": {"sha256": "1"}, "b": {"sha256": "2"}}
    assert len({files_hash(x) for x in (one, {"a": {"sha256": "2"}, "b": {"sha256": "1"}}, {"a": {"sha256": "1"}}, {"c": {"sha256": "1"}, "b": {"sha256": "2"}})}) == 4
    assert files_hash(one) == files_hash(dict(reversed(one.items())))
