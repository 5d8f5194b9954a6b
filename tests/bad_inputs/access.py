"""Who may use a run's Ray, and what goes to a cluster: tokens, folders for sockets, addresses, packages of jobs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bad_inputs.harness import Case, Outcome
from tests.bad_inputs.inputs import base, run_yaml

TOKEN = "sekret0123456789" * 4
NOBODY = "http://127.0.0.1:1"  # where no dashboard is
Make = Callable[[Path], object]


def train(*before: Make, flags: Sequence[str] = ()) -> Callable[[Path], Sequence[str]]:
    """`most-ray train` of a good run, after what `before` does to the folder."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "c.yaml").write_text(run_yaml())
        for each in before:
            each(folder)
        return ["train", "--config", "c.yaml", *flags]

    return make


def sweep(folder: Path) -> Sequence[str]:
    (folder / "c.yaml").write_text(
        run_yaml(val_asr_dirs=[str(base() / "test_takes")], space={"learning_rate": "1e-3 | 1e-4"}, max_trials=2)
    )
    return ["sweep", "--config", "c.yaml"]


def submit(*before: Make, words: Sequence[str] = ("train", "--config", "c.yaml"), address: str = NOBODY) -> Callable[[Path], Sequence[str]]:
    """`most-ray submit` of a folder with a small configuration, after what `before` does to the folder."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "c.yaml").write_text("name: r\ntrain_asr_dirs: [data/train]\n")
        for each in before:
            each(folder)
        return ["submit", "--address", address, *words]

    return make


def jobs(*before: Make, flags: Sequence[str] = (), address: str = NOBODY) -> Callable[[Path], Sequence[str]]:
    """`most-ray jobs`, after what `before` does to the folder."""

    def make(folder: Path) -> Sequence[str]:
        for each in before:
            each(folder)
        return ["jobs", "--address", address, *flags]

    return make


def put(name: str, content: str | bytes = "sekret", mode: int = 0o600) -> Make:
    """Writes a file below the folder; below its parent, which is the home folder, where the name begins with "../"."""

    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(mode)

    return write


def sparse(name: str, size: int) -> Make:
    """A file of so many bytes that takes no room."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.truncate(os.open(folder / name, os.O_CREAT | os.O_WRONLY), size)

    return write


def link(name: str, target: str) -> Make:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)

    return write


def home_is(mode: int) -> Callable[[Path, Outcome], None]:
    """Checks the mode of the token in the home folder."""

    def check(folder: Path, outcome: Outcome) -> None:
        found = (folder.parent / ".ray" / "auth_token").stat().st_mode & 0o777
        assert found == mode, f"{found:o}"

    return check


def token_case(name: str, before: Make, says: str, path: str = "token") -> Case:
    """A run whose RAY_AUTH_TOKEN_PATH is wrong."""
    return Case(
        f"token {name}",
        train(before),
        ["RAY_AUTH_TOKEN_PATH = ", says],
        never=["sekret"],
        environment={**CLEAN, "RAY_AUTH_TOKEN_PATH": path},
    )


CLEAN: dict[str, str | None] = dict.fromkeys(
    ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_TMPDIR", "TMPDIR")
)
HOME_TOKEN = "../.ray/auth_token"
OPEN = "can be read or changed by other users of this machine"
NONE = "holds no token"
LONG = "long" * 12

TOKENS = [
    *(
        token_case(f"of mode {mode:o}", put("token", TOKEN, mode), rf"{OPEN} \(mode {mode:o}\)\. chmod 600 token")
        for mode in (0o644, 0o640, 0o604)
    ),
    *(token_case(f"of mode {mode:o}", put("token", TOKEN, mode), rf"{OPEN} \(mode {mode:o}\)") for mode in (0o660, 0o602, 0o777, 0o610)),
    token_case("with a blank in its name", put("my token", TOKEN, 0o644), r"chmod 600 'my token'", "my token"),
    token_case("with an escape in its name", put("t\x1b[31m", TOKEN, 0o644), r"t\\x1b\[31m", "t\x1b[31m"),
    token_case("missing", lambda folder: None, "cannot be read .No such file"),
    token_case("folder", lambda folder: (folder / "token").mkdir(), "is no file"),
    token_case("pipe", lambda folder: os.mkfifo(folder / "token", 0o600), "is no file"),
    token_case("endless", link("token", "/dev/zero"), "is no file"),
    token_case("nothing", link("token", "/dev/null"), "is no file"),
    token_case("link to nowhere", link("token", "nowhere"), "cannot be read"),
    token_case("link to itself", link("token", "token"), "cannot be read .Too many levels"),
    token_case("below a file", put("file"), "cannot be read .Not a directory", "file/token"),
    token_case("with a tilde", lambda folder: None, "cannot be read .No such file", "~/token"),
    token_case("empty", put("token", ""), NONE),
    token_case("blank", put("token", " \n\n"), NONE),
    token_case("binary", put("token", b"\xff\x00sekret"), NONE),
    token_case("with an escape", put("token", "sekret\x1b[31m"), NONE),
    token_case("with letters that no header takes", put("token", "sekr\u00e9t"), NONE),
    token_case("long", put("token", "sekret" * 10_000), NONE),
    *(
        Case(
            f"token itself {name}",
            train(),
            "RAY_AUTH_TOKEN: holds no token",
            never=["sekret"],
            environment={**CLEAN, "RAY_AUTH_TOKEN": text},
        )
        for name, text in (("blank", "  "), ("with an escape", "sekret\x1b]0;x\x07"), ("not in ASCII", "s\u00e9kret sekret"))
    ),
    *(
        Case(
            f"mode {mode!r}", train(), rf"RAY_AUTH_MODE = '{mode}': is not one of its choices", environment={**CLEAN, "RAY_AUTH_MODE": mode}
        )
        for mode in ("tokn", "disable", "on", " token", "1")
    ),
    *(
        Case(f"home token {name}", train(before), ["token = ", says], never=["sekret"], environment=CLEAN)
        for name, before, says in (
            ("empty", put(HOME_TOKEN, ""), NONE),
            ("a folder", lambda folder: (folder / HOME_TOKEN).mkdir(parents=True), "is no file"),
            ("a link to nowhere", link(HOME_TOKEN, "nowhere"), "cannot be read"),
        )
    ),
    Case(
        "token open, sweep",
        lambda folder: (put("token", TOKEN, 0o644)(folder), sweep(folder))[1],
        OPEN,
        environment={**CLEAN, "RAY_AUTH_TOKEN_PATH": "token"},
    ),
    *(
        Case(f"home token open, {name}", make, ["token = ", OPEN], never=["sekret"], check=home_is(0o644), environment={**CLEAN, **more})
        for name, make, more in (
            ("ray_address", train(put(HOME_TOKEN, TOKEN, 0o644), flags=("--ray_address", "auto")), {}),
            ("RAY_ADDRESS", train(put(HOME_TOKEN, TOKEN, 0o644)), {"RAY_ADDRESS": "auto"}),
            ("submit", submit(put(HOME_TOKEN, TOKEN, 0o644)), {}),
            ("submit --stop", submit(put(HOME_TOKEN, TOKEN, 0o644), words=("--stop", "x")), {}),
            *(
                (f"jobs {' '.join(flags)}", jobs(put(HOME_TOKEN, TOKEN, 0o644), flags=flags), {})
                for flags in ((), ("--stop", "x"), ("--json",))
            ),
        )
    ),
    Case(
        "home token open, doctor",
        lambda folder: (put(HOME_TOKEN, TOKEN, 0o644)(folder), ["doctor", "--output_dir", "runs"])[1],
        ["safety", "warning", "closes"],
        code=0,
        never=["sekret"],
        check=home_is(0o644),
        environment=CLEAN,
    ),
]

FOLDERS = [
    *(
        Case(f"RAY_TMPDIR {name}", train(before), ["RAY_TMPDIR = ", says], environment={**CLEAN, "RAY_TMPDIR": named})
        for name, before, named, says in (
            ("long", lambda folder: None, f"/tmp/{LONG}", "bytes too long for Ray's sockets, whose names have at most 107"),
            ("long in bytes", lambda folder: None, "/tmp/" + "\u8cc7\u6599" * 7, "bytes too long"),
            ("relative", lambda folder: None, f"{LONG}/x", "bytes too long"),
            ("with an escape", lambda folder: None, f"/tmp/\x1b[31m{LONG}", r"\\x1b\[31m"),
            ("where nothing can be made", lambda folder: None, "/proc/x", "cannot be "),
            ("a file", put("t"), "t", "is no folder that you may write to"),
            ("a device", lambda folder: None, "/dev/null", "is no folder that you may write to"),
            ("below a file", put("t"), "t/x", "is no folder that you may write to"),
            ("a link to itself", link("t", "t"), "t", "RAY_TMPDIR"),
        )
    ),
    Case("RAY_TMPDIR long, sweep", sweep, "RAY_TMPDIR = .*bytes too long", environment={**CLEAN, "RAY_TMPDIR": f"/tmp/{LONG}"}),
]

ADDRESSES = [
    *(
        Case(f"{command} address {address!r}", make(address=address), says, never=["sekret"], environment=CLEAN)
        for command, make in (("submit", submit), ("jobs", jobs))
        for address, says in (
            (NOBODY, "address = .*does not answer as a Ray dashboard"),
            ("http://user:sekret@127.0.0.1:1", r"\*\*\*@127.0.0.1:1.*does not answer"),
            ("http://", "address"),
            ("http://[::1", "address"),
            ("http://\x1b[31m", r"\\x1b\[31m"),
            ("127.0.0.1:1", "nothing listens there"),
            ("127.0.0.1:99999", "nothing listens there"),
            ("user:sekret@127.0.0.1:1", r"\*\*\*@127.0.0.1:1': is not of the form HOST:PORT"),
            ("nonsense", "is not of the form HOST:PORT"),
        )
    ),
    *(
        Case(f"ray_address {address!r}", train(flags=("--ray_address", address)), says, never=["sekret"], environment=CLEAN)
        for address, says in (
            (NOBODY, "is a dashboard's address"),
            ("http://user:sekret@127.0.0.1:8265", "is a dashboard's address"),
            ("127.0.0.1:1", "nothing listens there"),
            ("127.0.0.1:0", "nothing listens there"),
            ("127.0.0.1:99999", "nothing listens there"),
            ("256.0.0.1:6379", "nothing listens there"),
            ("x\x1b[31m:1", r"\\x1b\[31m.*is not of the form HOST:PORT"),
            ("local", "is not of the form HOST:PORT"),  # with which Ray would start another one
            ("ray://127.0.0.1:10001", "is not of the form HOST:PORT"),
            ("10.0.0.1", "is not of the form HOST:PORT"),
            ("10.0.0.1:", "is not of the form HOST:PORT"),
            ("10.0.0.1:6379/x", "is not of the form HOST:PORT"),
            ("user:sekret@10.0.0.1:6379", "is not of the form HOST:PORT"),
            ("two words:6379", "is not of the form HOST:PORT"),
        )
    ),
]


def told(
    name: str, *before: Make, says: str | Sequence[str], never: Sequence[str] = (), words: Sequence[str] = ("train", "--config", "c.yaml")
) -> Case:
    """A submission that names something, and then finds no cluster."""
    both = [*([says] if isinstance(says, str) else says), "does not answer as a Ray dashboard"]
    return Case(f"submit {name}", submit(*before, words=words), both, never=never, environment=CLEAN)


STATE = "working_dir = .*holds a cluster's state, .*which lets everyone in"
WITHHELD = "Not sent with the job, as it may hold credentials: "
STAYS = r"is not sent with the job, which looks for it below MOST_RAY_HOME"
DATA = put("data/train/records.jsonl", "{}")
JOBS = [
    *(
        Case(f"jobs {' '.join(flags)}", jobs(flags=flags), says, environment=CLEAN)
        for flags, says in (
            (("--stop", "a", "--follow", "b"), "stop: and follow exclude each other"),
            (("--stop", "a", "--json"), "stop: and json exclude each other"),
            (("--json", "--follow", "\x1b[31m"), "follow: and json exclude each other"),
            (("a",), "'a'|argument.*belongs to no flag"),
            (("--stop",), "expected one argument"),
            (("--stpo", "a"), "Did you mean 'stop'"),
            (("--stop", "a"), "does not answer as a Ray dashboard"),
            (("--follow", "a"), "does not answer as a Ray dashboard"),
            (("--json",), "does not answer as a Ray dashboard"),
        )
    ),
]

PACKAGES = [
    *(
        told(f"with {name!r}", put(name), says=f"{WITHHELD}{shown}\\. Copy what the job needs", never=["sekret"])
        for name, shown in (
            (".env", r"\.env"),
            ("deploy/prod.env", "deploy/prod.env"),
            (".netrc", r"\.netrc"),
            (".aws/credentials", r"\.aws"),
            (".ssh/config", r"\.ssh"),
            (".kube/config", r"\.kube"),
            (".docker/config.json", r"\.docker/config.json"),
            ("a/b/server.pem", "a/b/server.pem"),
            ("ID_RSA", "ID_RSA"),
            (".pypirc", r"\.pypirc"),
            (".git-credentials", r"\.git-credentials"),
            ("\x1b[31m.env", r"\\x1b\[31m\.env"),
            ("two\nlines.pem", r"two\\nlines\.pem"),
            ("grafana_password", "grafana_password"),
        )
    ),
    told("with many", *(put(f"{number}.pem") for number in range(20)), says=rf"{WITHHELD}(\d+\.pem, ){{7}}\d+\.pem and 12 more"),
    told("with a token of another name", put("n/otes", TOKEN.replace("k", "1")), says=f"{WITHHELD}n/otes", never=["se1ret"]),
    told("with a link to a key", put("../.ssh/id_rsa"), link("notes.txt", "../.ssh/id_rsa"), says=f"{WITHHELD}notes.txt"),
    told("with links around", link("a", "."), link("b/c", ".."), says="as it is a link to a folder around it: a, b/c"),
    told(
        "of data that git ignores",
        DATA,
        put(".gitignore", "data/\n"),
        says=["train_asr_dirs = 'data/train'", STAYS, "gitignore excludes it"],
    ),
    told("of data that Ray ignores", DATA, put(".rayignore", "*.jsonl\n"), says=[STAYS, "rayignore excludes it"]),
    told(
        "of data that are never sent",
        put("runs/d/records.jsonl"),
        says=["train_asr_dirs", STAYS, "runs never is"],
        words=("train", "--train_asr_dirs", "runs/d"),
    ),
    told(
        "of data with a secret name",
        put(".aws/records.jsonl"),
        says=["train_asr_dirs", STAYS, ".aws"],
        words=("train", "--train_asr_dirs", ".aws"),
    ),
    told(
        "of an evaluation of ignored data",
        DATA,
        put(".gitignore", "data\n"),
        says=["asr_dirs", STAYS],
        words=("evaluate", "--model", "m", "--asr_dirs", "data/train", "--output", "e.json"),
    ),
    *(
        Case(f"submit {name}", make, says, environment=CLEAN)
        for name, make, says in (
            *(
                (f"{which} state", submit(*(put(f"s/{name}") for name in names)), [STATE, "/s .its token", "set MOST_RAY_CLUSTER_DIR"])
                for which, *names in (("up.sh's", "auth_token", "lock"), ("Slurm's", "token", "head.log"), ("Ray's", "session_latest"))
            ),
            ("state behind a link", submit(put("../s/auth_token"), put("../s/lock"), link("a/b", "../../s")), [STATE, "a/b"]),
            ("state that is the folder", submit(put("auth_token"), put("lock")), [STATE, "--working_dir"]),
            (
                "state in a home folder",
                submit(put("../.most_ray/cluster/x"), words=("--working_dir", "..", "train", "--config", "c.yaml")),
                [STATE, r"\.most_ray"],
            ),
            (
                "a folder that is too large",
                submit(
                    sparse("d/a.bin", 90 << 20),
                    sparse("d/e/b.bin", 70 << 20),
                    put("f.txt"),
                    words=("--what", "train", "--config", "c.yaml"),
                ),
                [r"holds 160 MiB, a job takes at most 100: d/a.bin 90 MiB, d/e/b.bin 70 MiB, c.yaml .* B, f.txt 6 B\.", r"\.rayignore"],
            ),
            ("a folder that is too large, shown", submit(sparse("a", 200 << 20), words=("--what",)), "at most 100: a 200 MiB"),
            ("a folder that is none", submit(words=("--working_dir", "nothing", "train")), "working_dir = .*is no folder"),
            ("a folder that is a file", submit(words=("--working_dir", "c.yaml", "train")), "working_dir = .*is no folder"),
            ("an ignore file that is no text", submit(put(".gitignore", b"\xff\xfe")), r"working_dir = .*cannot be packed \(.*utf-8"),
            ("an ignore file below that is no text", submit(put("a/.rayignore", b"\xff")), r"working_dir = .*cannot be packed"),
            (
                "a name that is no text",
                submit(lambda folder: open(bytes(folder) + b"/caf\xe9", "w").close()),
                "working_dir = .*cannot be packed",
            ),
            (
                "a configuration with a secret name",
                submit(put("a.env", "name: r"), words=("train", "--config", "a.env")),
                "a.env may hold credentials",
            ),
            (
                "a configuration in a secret folder",
                submit(put(".ssh/c.yaml", "name: r"), words=("train", "--config", ".ssh/c.yaml")),
                ".ssh may hold",
            ),
            (
                "a configuration that git ignores",
                submit(put(".gitignore", "*.yaml\n")),
                "is not sent with the job: .*gitignore excludes it",
            ),
            (
                "a configuration elsewhere",
                submit(put("../o.yaml", "name: r"), words=("train", "--config", "../o.yaml")),
                "is outside of the folder",
            ),
            ("credentials in a flag", submit(words=("train", "--output_dir", "s3://user:sekret@x/y")), "contains credentials"),
            ("credentials in a key", submit(put("c.yaml", "output_dir: s3://user:sekret@x/y")), "contains credentials .output_dir"),
            ("nothing", submit(words=()), "cannot be submitted"),
            ("what is no command", submit(words=("trian",)), "Did you mean 'train'"),
            ("a stop with a command", submit(words=("--stop", "x", "train")), "takes no command"),
        )
    ),
]

CASES = [*TOKENS, *FOLDERS, *ADDRESSES, *JOBS, *PACKAGES]
