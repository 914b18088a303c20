"""Settings of runs of older versions, in the words of today."""

from __future__ import annotations

from typing import Any

NONE = {"name": "none"}
PLAIN = {"name": "plain"}
RATE_DISTORTION = "rate_distortion"  # once a precision and a reservation, now an allocation
SHARES = {"small": 0.0025, "large": 0.01}  # that it had where nothing else was asked


def current(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run as this version would write them; damaged ones as they are."""
    precision, reservation = config.get("precision"), config.get("reservation")
    if not isinstance(precision, dict) or not isinstance(reservation, dict):
        return config
    config = {"objective": PLAIN, **config}
    solver = config.get("solver")
    if isinstance(solver, dict) and solver.get("name") == "gptq":
        config = {**config, "solver": {"asymmetric": 0.0, **solver}}
    if precision.get("name") != RATE_DISTORTION:
        return {**config, "allocation": config.get("allocation", NONE)}
    shares = {key: reservation.get(key, value) for key, value in SHARES.items()}
    reserve = reservation.get("name") == RATE_DISTORTION
    allocation = {**precision, "reserve": reserve, **shares}
    return {**config, "precision": NONE, "reservation": NONE, "allocation": allocation}


def current_words(said: dict[str, Any]) -> dict[str, Any]:
    """Return what overrides say of a config (`config_of`) as today's words would say it."""
    precision = said.get("precision")
    if not isinstance(precision, dict) or precision.get("name") != RATE_DISTORTION:
        return said
    left = {key: value for key, value in said.items() if key not in ("precision", "reservation")}
    return {**left, "allocation": precision}
