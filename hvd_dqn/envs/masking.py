"""Collects the action masks of several copies of an environment from the `info` of their resets and steps."""

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from hvd_dqn.envs.actions import ActionMap
from hvd_dqn.envs.wrappers import EnvFailure, one_line


class Masks:
    """Reads masks of E copies, [E, S] bool. `is_native` says that a vector class gives them in the environment's own form.

    All methods raise EnvFailure if a mask is missing or allows no action; it names copies from `first_index` on.
    """

    def __init__(self, action_map: ActionMap, copies: int, first_index: int, is_native: bool) -> None:
        self._map, self._copies, self._first_index, self._is_native = action_map, copies, first_index, is_native

    def read(self, info: Mapping[str, Any], needed: np.ndarray) -> np.ndarray:
        """The masks in `info` where they are `needed`, [E] bool; elsewhere all actions are allowed."""
        given: Any = info.get("action_mask")
        missing = needed if given is None else needed & ~info.get("_action_mask", np.ones(self._copies, np.bool_))
        if missing.any():
            self._fail(missing, "gave no action mask", f"expected info['action_mask'], received {sorted(info)}")
        mask = np.ones((self._copies, self._map.choices.total), np.bool_)
        if self._is_native:
            try:
                mask[needed] = [self._map.read_mask(given[i]) for i in np.flatnonzero(needed)]
            except ValueError as error:
                self._fail(needed, "cannot be masked", f"received {one_line(error)}")
        else:
            mask[needed] = given[needed]  # `RecordedEnv` has read them
        if not (possible := self._map.choices.leaves_any(mask)).all():
            self._fail(~possible, "allows no action", "its action mask is 0 everywhere in a state that is not terminal")
        return mask

    def with_final(
        self, mask: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, info: Mapping[str, Any]
    ) -> np.ndarray:
        """`mask`, but for each ended episode that of its last observation. At a terminal state all actions are allowed."""
        cut = truncated & ~terminated
        mask = np.where(terminated[:, None], True, mask)
        return np.where(cut[:, None], self.read(info.get("final_info", {}), cut), mask)

    def _fail(self, which: np.ndarray, did: str, why: str) -> NoReturn:
        raise EnvFailure([self._first_index + i for i in np.flatnonzero(which).tolist()], did, why)
