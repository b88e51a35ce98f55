"""Publishing against a stand-in for the hub: what is sent, what is asked before, and what is refused."""
import os
import subprocess
import sys

import pytest
from servers.hub_upload import Upload

from domain_adapt.card import Parcel, markdown
from domain_adapt.models import files_hash

SEND = """
import sys
from pathlib import Path
from domain_adapt.card import Parcel, publish
from domain_adapt.params import UserError
folder, repo, public, answer = sys.argv[1:]
p = Parcel("linear-0.5", Path(folder), ("config.json", "model.safetensors", "README.md"), "# The card\\n")
def agreed(text):
    print(text, flush=True)
    return answer == "yes"
try: print("address:", publish(p, repo or None, public == "yes", agreed))
except UserError as e: sys.exit(f"UserError: {e}")
"""


@pytest.fixture
def folder(tmp_path):
    "A merge's folder, with things that must stay at home."
    at = tmp_path / "linear-0.5"
    at.mkdir()
    for name, data in {"config.json": b"{}", "model.safetensors": os.urandom(70_000), "README.md": b"# The first card\n", "modeling_x.py": b"raise SystemExit",
                       ".env": b"SECRET=1"}.items(): (at / name).write_bytes(data)
    return at


def send(hub, folder, repo="jo/model", public="no", answer="yes", token="hf_right"):
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder.parent / "hf")}
    env = {k: v for k, v in env.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")} | ({"HF_TOKEN": token} if token else {})
    return subprocess.run([sys.executable, "-c", SEND, str(folder), repo, public, answer], env=env, text=True, capture_output=True, timeout=120)


@pytest.fixture
def hub():
    with Upload() as server: yield server


@pytest.mark.server
class TestPublish:
    def test_files_arrive_whole_and_private_with_the_parcels_card(self, hub, folder):
        done = send(hub, folder)
        assert done.returncode == 0, done.stderr
        assert hub.repositories == {"jo/model": {"config.json": b"{}", "README.md": b"# The card\n",
                                                 "model.safetensors": (folder / "model.safetensors").read_bytes()}}
        assert hub.private == {"jo/model"} and "70,000  model.safetensors" in done.stdout and f"{hub.endpoint}/jo/model" in done.stdout
        assert "hf_right" not in done.stdout + done.stderr

    def test_no_means_that_nothing_is_written(self, hub, folder):
        done = send(hub, folder, answer="no")
        assert done.returncode == 0 and "address: None" in done.stdout
        assert hub.repositories == {} and not hub.written()

    def test_public_is_said_in_capitals(self, hub, folder):
        done = send(hub, folder, repo="", public="yes")
        assert "PUBLIC" in done.stdout and list(hub.repositories) == ["jo/linear-0.5"] and not hub.private

    def test_a_repository_that_is_there_is_said_to_be(self, hub, folder):
        hub.repositories["jo/model"] = {"other": b"x", "config.json": b"old"}
        done = send(hub, folder)
        assert "is there already" in done.stdout and hub.repositories["jo/model"]["config.json"] == b"{}" and hub.repositories["jo/model"]["other"] == b"x"

    @pytest.mark.parametrize("token, said", [("hf_wrong", "401"), (None, "hf auth login")])
    def test_without_the_right_token_nothing_happens(self, hub, folder, token, said):
        done = send(hub, folder, token=token)
        assert "UserError: publish:" in done.stderr and said in done.stderr and not hub.written() and "hf_wrong" not in done.stderr + done.stdout

    def test_what_the_hub_refuses_is_said(self, hub, folder):
        hub.fail["/commit/"] = 403
        done = send(hub, folder)
        assert "UserError: publish:" in done.stderr and "403" in done.stderr and hub.repositories["jo/model"] == {}


def test_tables_keep_what_stands_in_a_cell(): 
    import pandas as pd
    text = markdown(pd.DataFrame({"what": ["a|b\nc", "<img src=x>"], "n": [1, 2]}))
    assert len(text.splitlines()) == 4 and "a\\|b c" in text and "&lt;img" in text


def test_a_hash_changes_with_names_and_contents():
    one = {"a": {"sha256": "1"}, "b": {"sha256": "2"}}
    assert len({files_hash(x) for x in (one, {"a": {"sha256": "2"}, "b": {"sha256": "1"}}, {"a": {"sha256": "1"}}, {"c": {"sha256": "1"}, "b": {"sha256": "2"}})}) == 4
    assert files_hash(one) == files_hash(dict(reversed(one.items())))
