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
from most_ray.service.cluster.job_package import CREDENTIALS, EXCLUDES, Package, largest_parts, package_of
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


TOKEN = "0123456789abcdef" * 4


@pytest.fixture
def tokenless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to send, for a user whose home is another one and who has set nothing."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "MOST_RAY_CLUSTER_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return make(tmp_path / "f", "a.txt")


STATES = {  # files by which a cluster's state is known, whoever has started it
    "up.sh": ("auth_token", "lock", "env", "ray.log"),
    "train.sbatch": ("token", "head.log"),
    "Ray": ("session_latest", "ray_current_cluster"),
}


@pytest.mark.parametrize("where", ["state", "deep/in/state", "."])
@pytest.mark.parametrize("files", STATES.values(), ids=STATES)
def test_a_clusters_state_is_refused(tokenless: Path, where: str, files: tuple[str, ...]) -> None:
    make(tokenless / where, *files)
    with pytest.raises(ConfigError, match=r"working_dir = .*holds a cluster's state, .*its token, which lets everyone in") as refused:
        package_of(tokenless)
    assert str(tokenless / where) in refused.value.rule
    assert ("--working_dir" if where == "." else "MOST_RAY_CLUSTER_DIR or RAY_TMPDIR") in refused.value.remedy


def test_a_clusters_state_behind_a_link_is_refused(tokenless: Path) -> None:
    make(tokenless.parent / "elsewhere", "auth_token", "lock", "prometheus/x")
    (tokenless / "link").symlink_to(tokenless.parent / "elsewhere")
    with pytest.raises(ConfigError, match="holds a cluster's state"):
        package_of(tokenless)
    (tokenless / "link").unlink()
    (tokenless / "deeper").symlink_to(tokenless.parent / "elsewhere" / "prometheus")
    assert package_of(tokenless).withheld == ("deeper",)


@pytest.mark.parametrize("named", ["{folder}/s", "s", "../f/s", "{link}/s"])
def test_state_that_a_setting_names_is_refused_whatever_is_in_it(tokenless: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    make(tokenless, "s/ray.log")
    link = tokenless.parent / "link"
    link.symlink_to(tokenless)
    monkeypatch.chdir(tokenless)
    monkeypatch.setenv("MOST_RAY_CLUSTER_DIR", named.format(folder=tokenless, link=link))
    for folder in (tokenless, link):
        with pytest.raises(ConfigError, match=r"holds a cluster's state, .*/s "):
            package_of(folder)


def test_the_home_folder_is_refused_where_it_holds_state(tokenless: Path) -> None:
    home = tokenless.parent / "home"
    make(home, "a.txt")
    assert package_of(home).files == {"a.txt"}
    make(home, ".most_ray/cluster/auth_token", ".most_ray/cluster/lock")
    with pytest.raises(ConfigError, match="holds a cluster's state"):
        package_of(home)


@pytest.mark.parametrize(
    ("ignored", "place"), [("state/\n", "state"), ("*\n!a.txt\n", "state"), ("", "runs/state"), ("", ".venv/state"), ("", "wandb")]
)
def test_state_that_stays_here_is_no_matter(tokenless: Path, ignored: str, place: str) -> None:
    make(tokenless / place, "auth_token", "lock")
    (tokenless / ".gitignore").write_text(ignored)
    assert packed(tokenless, package_of(tokenless)) == package_of(tokenless).files <= {"a.txt", ".gitignore"}


@pytest.mark.parametrize("named", ["{folder}/..", "/tmp", "{folder}/nothing"])
def test_state_around_or_nowhere_is_no_matter(tokenless: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("MOST_RAY_CLUSTER_DIR", named.format(folder=tokenless))
    monkeypatch.setenv("RAY_TMPDIR", named.format(folder=tokenless))
    make(tokenless, "auth/lock", "lock", "head.log", "cluster/local/up.sh")
    assert "a.txt" in package_of(tokenless).files


@pytest.mark.parametrize(
    ("text", "mode", "sent"),
    [
        (TOKEN, 0o600, False),
        (TOKEN + "\n", 0o400, False),
        ("hf_abcdefghijklmnopqrstuvwxyz012345678", 0o600, False),
        ("2f1c8a90-0c6e-4b9e-9a55-0123456789ab", 0o600, False),
        (TOKEN, 0o644, True),  # a checksum, say: everyone can read it already
        ("a line of text with 1 number in it, as transcripts are", 0o600, True),
        ("onewordoflettersalonethatislongenoughforatoken", 0o600, True),
        ("runs/digits/checkpoints/step-000000040", 0o600, True),
        ("{}", 0o600, True),
        ("", 0o600, True),
        (f"{TOKEN}\n{TOKEN}\n", 0o600, True),
    ],
)
def test_a_file_that_is_a_token_is_not_sent_whatever_its_name(tokenless: Path, text: str, mode: int, sent: bool) -> None:
    (tokenless / "notes").write_text(text)
    (tokenless / "notes").chmod(mode)
    package = package_of(tokenless)
    assert ("notes" in packed(tokenless, package)) == sent == (package.withheld == ())


@pytest.mark.parametrize("by", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "home"])
def test_a_copy_of_the_token_in_use_is_not_sent_whatever_its_mode(tokenless: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    own, file = "correct-horse", tokenless.parent / "home" / ".ray" / "auth_token"
    if by != "RAY_AUTH_TOKEN":
        make(file.parent, "auth_token")
        file.write_text(own + "\n")
        file.chmod(0o600)
    if by != "home":
        monkeypatch.setenv(by, own if by == "RAY_AUTH_TOKEN" else str(file))
    (tokenless / "copy").write_text(own + "\n")
    assert packed(tokenless, package_of(tokenless)) == {"a.txt"}


def test_what_is_sent_is_shown_without_a_cluster(
    tokenless: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(service, "open_client", lambda address: pytest.fail("asked"))
    monkeypatch.chdir(tokenless)
    make(tokenless, ".env")
    (tokenless / "b").mkdir()
    (tokenless / "b" / "big.bin").write_bytes(b"x" * 5_000_000)
    for words in (["--what"], ["--what", "train", "--max_steps", "1"], ["train", "--max_steps", "1", "--what"]):
        assert main(["submit", *words]) == 0
        first, *rest = capsys.readouterr().out.splitlines()
        assert first == f"2 files, 4.8 MiB of {tokenless} would be sent:"
        assert [line.split() for line in rest[:2]] == [["4.8", "MiB", "b/big.bin"], ["6", "B", "a.txt"]]
        assert rest[2].startswith("Not sent with the job, as it may hold credentials: .env")
    with (tokenless / "b" / "big.bin").open("wb") as stream:
        stream.truncate(200 << 20)
    assert main(["submit", "--what"]) == 2
    assert "holds 200 MiB, a job takes at most 100: b/big.bin 200 MiB, a.txt 6 B." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({}, []),
        ({"a": 1}, [("a", 1)]),
        ({"d/a": 5, "d/b": 5, "d/c": 5}, [("d/", 15)]),
        ({"d/a": 50, "d/b": 5, "e": 7}, [("d/a", 50), ("e", 7), ("d/b", 5)]),
        ({"d/e/f/a": 3, "d/e/f/b": 3, "d/e/f/c": 3, "x/y": 4}, [("d/e/f/", 9), ("x/y", 4)]),
        ({f"{letter}": 1 for letter in "zyxwvutsrqponm"}, [(letter, 1) for letter in "mnopqrstuv"]),
        ({"empty/a": 0, "b": 0}, [("b", 0), ("empty/a", 0)]),
    ],
)
def test_the_largest_parts_are_what_one_would_leave_out(sizes: dict[str, int], parts: list[tuple[str, int]]) -> None:
    assert largest_parts(sizes, 10) == parts


def test_long_names_leave_the_error_readable(tmp_path: Path) -> None:
    sizes = {f"{'deep/' * 40}{number}.bin": 20 << 20 for number in range(30)} | {"x" * 250: 900 << 20}
    error = Package(tmp_path, sum(sizes.values()), sizes).too_large("a job takes at most 100")
    assert len(str(error)) < 1000 and "900 MiB" in str(error) and "\n" not in str(error)


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


def test_the_whole_package_is_sent() -> None:
    """Else a job takes the modules that it lacks from what is installed on the cluster, of another version perhaps, or fails."""
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "most_ray").rglob("*") if path.is_file()}
    sent = package_of(ROOT).files
    assert not {name for name in own if "__pycache__" not in name} - sent and not any("__pycache__" in name for name in sent)


@pytest.mark.parametrize("name", ["runs/a/x", "work/runs/a/x", "most_ray/runs/a/x", "most_ray/runs/a/checkpoints/x", "a/most_ray/runs/x"])
def test_runs_are_not_sent_wherever_they_are(tmp_path: Path, name: str) -> None:
    """Also from the folder around a checkout that is called most_ray."""
    folder = make(tmp_path / "f", name, "most_ray/runs/job.py")
    assert packed(folder, package_of(folder)) == {"most_ray/runs/job.py"} == package_of(folder).files


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
