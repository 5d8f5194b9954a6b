"""What is sent with a job: no credentials, no folder twice; what the user would miss there is said."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env import packaging

from most_ray.cli import main
from most_ray.errors import ConfigError
from most_ray.service.cluster import submit as service
from most_ray.service.cluster.job_package import CREDENTIALS, EXCLUDES, Package, package_of
from tests.conftest import ROOT

SECRET = [
    *(".env", ".env.local", "prod.env", "deploy/.env", ".envrc", ".netrc", "_netrc", ".aws/credentials", ".aws/config", ".ssh/id_ed25519"),
    *(".ssh/known_hosts", ".gnupg/pubring.kbx", "server.pem", "certs/a/b.key", "id_rsa", "id_rsa.pub", "keys/id_ecdsa", "putty.ppk"),
    *(
        ".pypirc",
        ".npmrc",
        ".git-credentials",
        ".kube/config",
        "kubeconfig",
        ".docker/config.json",
        "home/.docker/config.json",
        ".dockercfg",
    ),
    *(".config/gcloud/application_default_credentials.json", ".config/gh/hosts.yml", ".azure/x", "credentials.json", "my_credentials.json"),
    *("client_secret_1.json", "gcp-service-account.json", "kaggle.json", "terraform.tfstate", "secrets.yaml", "secrets.yml", "auth_token"),
    *(".huggingface/token", ".cache/huggingface/token", "hf.token", "token.txt", ".bash_history", ".ENV", "Server.PEM", ".SSH/x", "a.kdbx"),
]
SENT = [
    "config.yaml",
    "tokenizer.json",
    "added_tokens.json",
    "tokens.txt",
    "environment.json",
    "keys.py",
    "secrets.py",
    "train/records.jsonl",
]


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("sekret")
    return folder


def packed(folder: Path, package: Package) -> set[str]:
    """The files of the archive that Ray makes."""
    archive = folder.parent / f"{folder.name}.zip"
    packaging.create_package(str(folder), archive, include_gitignore=True, excludes=package.excludes)
    assert package.bytes == archive.stat().st_size
    return {name for name in zipfile.ZipFile(archive).namelist() if not name.endswith("/")}


@pytest.mark.parametrize("name", SECRET)
def test_what_may_hold_credentials_is_not_sent(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "f", name, *SENT)
    package = package_of(folder)
    assert packed(folder, package) == package.files == set(SENT)
    assert len(package.withheld) == 1 and name.startswith(package.withheld[0])
    (said,) = package.omissions([])
    assert said.startswith("Not sent with the job, as it may hold credentials: ") and package.withheld[0] in said


def test_one_line_says_all(tmp_path: Path) -> None:
    package = package_of(make(tmp_path / "f", *SECRET))
    (said,) = package.omissions([])
    assert ".aws" in said and " more. Copy what the job needs to another name." in said and "\n" not in said and len(said) < 400


def test_what_the_user_leaves_out_is_not_mentioned(tmp_path: Path) -> None:
    folder = make(tmp_path / "f", ".env", "a.txt")
    (folder / ".gitignore").write_text(".env\n")
    assert package_of(folder).omissions([]) == []
    (folder / ".gitignore").write_text("!.env\n")
    assert package_of(folder).withheld == (".env",)


def test_a_link_to_a_credential_is_one(tmp_path: Path) -> None:
    home = make(tmp_path / "home", ".ssh/id_rsa", ".aws/credentials", "notes.txt")
    folder = make(tmp_path / "f", "a.txt")
    (folder / "key").symlink_to(home / ".ssh" / "id_rsa")
    (folder / "cloud").symlink_to(home / ".aws")
    (folder / "odd [x]*!# name").symlink_to(home / ".ssh")
    (folder / "notes").symlink_to(home / "notes.txt")
    package = package_of(folder)
    assert packed(folder, package) == package.files == {"a.txt", "notes"}


def test_the_token_in_use_is_not_sent_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "f", "a.txt", "cluster/mine")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "cluster" / "mine"))
    assert packed(folder, package_of(folder)) == {"a.txt"}


def test_a_link_to_a_folder_around_it_is_not_followed(tmp_path: Path) -> None:
    """Ray follows it forty times; two of them, without end."""
    folder = make(tmp_path / "f", "a/b.txt")
    (folder / "a" / "up").symlink_to("..")
    (folder / "a" / "here").symlink_to(".")
    (folder / "again").symlink_to("a")
    package = package_of(folder)
    assert "a/b.txt" in package.files and {"a/up", "a/here"} <= set(package.loops)
    assert packed(folder, package) == package.files
    (said,) = package.omissions([])
    assert "as it is a link to a folder around it: a/here, a/up" in said


@pytest.mark.parametrize(
    ("name", "content"), [(".gitignore", b"\xff\xfe"), (".rayignore", b"caf\xe9\n"), (b"caf\xe9.txt", b""), ("sub/.gitignore", b"\xff")]
)
def test_what_cannot_be_packed_is_one_error(tmp_path: Path, name: str | bytes, content: bytes) -> None:
    folder = make(tmp_path / "f", "sub/a.txt")
    with open(bytes(folder) + b"/" + (name if isinstance(name, bytes) else name.encode()), "wb") as stream:
        stream.write(content)
    with pytest.raises(ConfigError, match=r"working_dir = .*cannot be packed \(.*utf-8"):
        package_of(folder)


def test_jobs_by_hand_leave_out_the_same() -> None:
    assert yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())["excludes"] == [*EXCLUDES, *CREDENTIALS]


def said_by(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines of a submission until the cluster is asked."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(service, "open_client", lambda address: (_ for _ in ()).throw(ConfigError("address", None, "is asked.")))
    assert main(["submit", *words]) == 2
    captured = capsys.readouterr()
    assert "address: is asked." in captured.err
    return captured.out.splitlines()


@pytest.mark.parametrize(
    ("ignored", "cause"),
    [
        ("data/\n", "data/train/records.jsonl is not sent with the job, which looks for it below MOST_RAY_HOME .*gitignore excludes it"),
        ("*.jsonl\n", "data/train/records.jsonl is not sent .*gitignore excludes it"),
        ("data/train/units.json\n", "data/train/units.json is not sent"),
    ],
)
def test_data_that_stay_here_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ignored: str, cause: str
) -> None:
    folder = make(tmp_path / "f", "data/train/records.jsonl", "data/train/units.json", "data/val/records.txt")
    (folder / "c.yaml").write_text("{train_asr_dirs: [data/train, /else/where, not/here], val_asr_dirs: [./data/val/]}")
    (folder / ".gitignore").write_text(ignored)
    said = said_by(folder, monkeypatch, capsys, "train", "--config", "c.yaml")
    fields = {line.split(" = ")[0] for line in said}
    assert fields == ({"train_asr_dirs", "val_asr_dirs"} if ignored == "data/\n" else {"train_asr_dirs"})
    assert any(re.search(cause, line) for line in said) and all("Change that file, or copy" in line for line in said)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["evaluate", "--model", "m", "--asr_dirs", "own/val", "--output", "e.json"], "asr_dirs"),
        (["prepare", "units", "--input", "own/val", "--output", "out", "--kmeans", "k.npy"], "input"),
        (["prepare", "tts", "--input_dir", "own/val", "--output_dir", "out"], "input_dir"),
        (["train", "--train_asr_dirs", "own/val", "--name", "x"], "train_asr_dirs"),
        (["prepare", "store", "--train_asr_dirs", "own/val", "--name", "x"], "train_asr_dirs"),
        (["doctor", "--train_asr_dirs", "own/val"], "train_asr_dirs"),
    ],
)
def test_every_command_names_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], field: str
) -> None:
    folder = make(tmp_path / "f", "own/val/records.jsonl", "out/own.txt", "e.json", "x/own")
    (folder / ".gitignore").write_text("own/\nout\ne.json\nx\n")
    (said,) = said_by(folder, monkeypatch, capsys, *words)
    assert said.startswith(f"{field} = 'own/val") and "own/val/records.jsonl is not sent with the job" in said
    (folder / ".gitignore").write_text("out\n")
    assert said_by(folder, monkeypatch, capsys, *words) == []
