"""Checks within seconds that a cluster can be joined at an address: Ray itself tries for minutes, with little explanation."""

from __future__ import annotations

import logging
import re
import socket
from typing import Any

import grpc
import ray
from ray._common.network_utils import is_localhost
from ray._private.authentication import authentication_token_setup
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import get_node_ip_address
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

from most_ray.errors import ConfigError
from most_ray.service.cluster.private_files import check_token
from most_ray.service.cluster.ray_internals import keep_loopback

NO_TOKEN = "requires a token, and none is set here."
WRONG_TOKEN = "does not accept this token."
TOKEN_REMEDY = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file that holds the cluster's token."
_CONNECT_S, _ANSWER_S = 5.0, 10.0  # seconds to open a connection, and for Ray to answer over it


def use_token() -> None:
    """Present this machine's token (~/.ray/auth_token), also where RAY_AUTH_MODE is not set: as `ray.init` does. Raises ConfigError where
    others can read it."""
    check_token()
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)  # it warns of just that
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def check_address(address: str) -> None:
    """Check that a Ray of this process's version listens at HOST:PORT and accepts its token, which no one else can read, else raise
    ConfigError. The address "auto" is left to Ray.

    Ray replaces a loopback address by this machine's outward one, where a head node that listens on loopback alone does not answer: in
    that case this process is set to keep the loopback address.
    """
    if re.match(r"https?://", address):
        rule = "is a dashboard's address, which accepts jobs: a run joins Ray itself."
        raise ConfigError("ray_address", address, rule, "Use `most-ray submit`, or HOST:6379 on one of the cluster's machines.")
    if address == "auto":
        use_token()
        return
    match = re.fullmatch(r"\[?([\w.:%-]+?)\]?:(\d{1,5})", address)
    if not match:  # "local" among them, with which Ray would start another one, and Ray waits for some others without end
        shown = re.sub("^.*@", "***@", address)
        raise ConfigError("ray_address", shown, "is not of the form HOST:PORT.", "Name the head's own address, as 10.0.0.1:6379.")
    host, port = match[1], int(match[2])
    if is_localhost(host):
        outward = get_node_ip_address()
        if not _listens(outward, port) and _listens(host, port):
            keep_loopback()
        else:
            host = outward
    if not _listens(host, port):
        raise ConfigError("ray_address", address, "does not answer: nothing listens there.", "Check it, and that Ray runs there.")
    use_token()
    try:
        theirs = _ask(init_grpc_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}"))
    except AuthenticationError as error:
        raise ConfigError("ray_address", address, NO_TOKEN, TOKEN_REMEDY) from error
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise ConfigError("ray_address", address, WRONG_TOKEN if is_token_auth_enabled() else NO_TOKEN, TOKEN_REMEDY) from error
        rule = f"does not answer as Ray does ({error.code().name.lower()})."
        raise ConfigError("ray_address", address, rule, "Name the head's own port (6379), not the dashboard's or a client's.") from error
    if theirs != ray.__version__:
        raise ConfigError("ray_address", address, *version_mismatch(theirs))


def _ask(channel: Any) -> str:
    """The version of the Ray whose control store is reached by a gRPC channel, which is closed."""
    with channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        return str(stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=_ANSWER_S).ray_version)


def requires_token(target: str) -> bool:
    """Whether the Ray at HOST:PORT refuses a call without a token."""
    try:
        _ask(grpc.insecure_channel(target))
    except grpc.RpcError:  # the head, which was reached before, refuses the call
        return True
    return False


def version_mismatch(theirs: str) -> tuple[str, str]:
    """The rule and the remedy of the error for a cluster that runs another version of Ray than this process."""
    return f"runs Ray {theirs}, this is {ray.__version__}.", "Install the same on both."


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            return True
    except (OSError, UnicodeError):  # the latter where the text cannot be a host's name
        return False
