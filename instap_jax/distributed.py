"""Joins the processes of a pod, one a host, into one JAX program."""

import os

import jax
from ml_collections import ConfigDict

from instap_jax.errors import UserError

# All three or none: a process that was told one of them is meant to be part of a pod.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(config: ConfigDict) -> None:
    """Connects this process to the others of its pod; alone, it does nothing.

    Must come before anything that asks JAX for devices. Where the others are:
      1. the environment variables `VARIABLES`, as a rehearsal and the launchers set them;
      2. what JAX finds out by itself on Cloud TPU, GKE and Slurm, unless JAX_PLATFORMS is 'cpu';
      3. nowhere: a single process.

    Args:
      config: `distributed` of the configuration.

    Raises:
      UserError: when the variables are incomplete or wrong, or the others do not come in time.
    """
    if jax.distributed.is_initialized():
        return
    explicit = _explicit(os.environ)
    # A Cloud TPU host that is asked for its CPU alone is no part of a pod.
    if not explicit and os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=config.initialization_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=config.heartbeat_timeout,
        )
    except ValueError as error:
        if explicit or "coordinator_address should be defined" not in str(error):
            raise UserError(f"cannot join the other processes: {error}") from error
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise  # a mistake of ours: something has asked for devices
        raise UserError(
            f"cannot join the other processes within {config.initialization_timeout} s "
            f"({str(error).splitlines()[0][:300]}); is every host up, and the coordinator's port "
            "open? config.distributed.initialization_timeout waits longer"
        ) from error


def _explicit(environment) -> dict[str, str | int]:
    """The arguments of `jax.distributed.initialize` that the environment names, or none."""
    given = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if not given:
        return {}
    if len(given) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in given)
        raise UserError(f"{', '.join(given)} set but not {missing}: set all three or none")
    address, *numbers = (given[name] for name in VARIABLES)
    if ":" not in address or not all(text.isdigit() for text in numbers):
        raise UserError(
            f"{', '.join(f'{name}={value}' for name, value in given.items())}: HOST:PORT and two "
            "whole numbers are expected"
        )
    count, index = map(int, numbers)
    if not index < count:
        raise UserError(f"JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}
