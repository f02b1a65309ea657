"""Any strategy of Flower's as an algorithm: its arithmetic, with everything of ours around it.

``strategy._target_: flwr.serverapp.strategy.FedAdam`` is all it takes. Who is asked, what an
update must be, checkpoints, tracking and the loop stay ours; the strategy gets the replies of our
cohort and says what the next model is. To it a client is a node with a number of its own, the same
in every round and after a resume.
"""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedProx, Strategy
from flwr.supercore.run import Run

from fl_app.algorithm import Algorithm, Memory, ServerState, Step
from fl_app.arrays import MalformedReplyError, decode_params, encode_params
from fl_app.codec import model_replies
from fl_app.metric_records import figures_of
from fl_app.objective import LocalObjective, OwnLoss, Proximal
from fl_app.params import describe_misfit
from fl_app.types import (
    ClientId,
    ClientUpdate,
    ConfigError,
    FlAppError,
    TooFewUpdatesError,
)

_T = TypeVar("_T")
_ARRAY, _RECORD = "__numpy__", "__arrays__"

_OURS = {
    **dict.fromkeys(
        ("fraction_train", "min_train_nodes", "min_available_nodes"),
        "who takes part is decided by selection, such as selection.fraction=0.5",
    ),
    **dict.fromkeys(
        ("fraction_evaluate", "min_evaluate_nodes"),
        "clients measure the model while they train, and after the last round",
    ),
    **dict.fromkeys(
        ("arrayrecord_key", "configrecord_key"), "the names of records are those our clients read"
    ),
}
"""Keys of Flower's strategies for what is ours to decide, and where it is decided."""

_REFUSED = {
    **dict.fromkeys(
        (
            flower.DifferentialPrivacyClientSideAdaptiveClipping,
            flower.DifferentialPrivacyClientSideFixedClipping,
            flower.DifferentialPrivacyServerSideAdaptiveClipping,
            flower.DifferentialPrivacyServerSideFixedClipping,
        ),
        "its noise comes from a generator that others can know and is charged to no ledger; name "
        "the strategy inside it, and choose the privacy by privacy=NAME",
    ),
    **dict.fromkeys(
        (flower.FedXgbBagging, flower.FedXgbCyclic),
        "it aggregates XGBoost's trees, and the models here are PyTorch's",
    ),
}


class StrategyError(FlAppError):
    """A strategy that is not ours failed, or gave what is no model."""


class FlowerAlgorithm:
    """An algorithm that a strategy of Flower's computes.

    The strategy is a scratch pad: whatever it keeps between rounds is read from its attributes
    after each step, and written back before the next if that is another than it made last.

    Args:
        strategy: Any ``flwr.serverapp.strategy.Strategy``.
        objective: What clients minimise besides their own loss; by default Flower's FedProx
            names its term, and all others have none.
        name: For the records; no effect. By default the class's.

    Raises:
        ConfigError: The strategy cannot serve; the message says why.
    """

    def __init__(
        self, *, strategy: Strategy, objective: LocalObjective | None = None, name: str = ""
    ) -> None:
        for refused, why in _REFUSED.items():
            if isinstance(strategy, refused):
                raise ConfigError(f"strategy={type(strategy).__name__} cannot be used: {why}.")
        self.strategy = strategy
        self.name = name or f"flower-{type(strategy).__name__}"
        mu = strategy.proximal_mu if isinstance(strategy, FedProx) else 0.0
        self.objective = objective or (Proximal(mu=mu) if mu else OwnLoss())
        # Our selection has drawn the cohort: all of it is to be asked, however small it is.
        for attribute, value in (
            ("fraction_train", 1.0),
            ("min_train_nodes", 0),
            ("min_available_nodes", 0),
        ):
            if hasattr(strategy, attribute):
                setattr(strategy, attribute, value)
        self._initial = {name: _kept(value) for name, value in vars(strategy).items()}
        self._last: Memory | None = None

    def instruct(
        self,
        state: ServerState,
        clients: Sequence[ClientId],
        arrays: ArrayRecord,
        config: ConfigRecord,
        *,
        round: int,
    ) -> Mapping[ClientId, RecordDict]:
        """Return what the strategy's ``configure_train`` sends to each client."""
        self._recall(state.memory)
        client_of = {_node(client): client for client in clients}
        messages = self._call(
            "configure_train",
            lambda: list(
                self.strategy.configure_train(
                    round, arrays.copy(), config, _Cohort(tuple(client_of))
                )
            ),
        )
        contents = {
            client_of[message.metadata.dst_node_id]: message.content
            for message in messages
            if message.metadata.dst_node_id in client_of
        }
        return {client: contents[client] for client in clients if client in contents}

    def step(
        self,
        state: ServerState,
        updates: Sequence[ClientUpdate],
        *,
        round: int,
        trainable: frozenset[str],
    ) -> Step:
        """Return the model that the strategy's ``aggregate_train`` makes of the updates.

        Raises:
            TooFewUpdatesError: It makes none.
            StrategyError: It fails, or gives what is no model.
        """
        self._last = None  # until this step is done, what it knows is nobody's memory
        replies = model_replies({_node(u.client): u for u in updates}, state.params, round=round)
        arrays, metrics = self._call(
            "aggregate_train", lambda: self.strategy.aggregate_train(round, replies)
        )
        if arrays is None:
            raise TooFewUpdatesError(
                f"{self.name} makes no model of {len(updates)} updates; its own log says why"
            )
        try:
            given = decode_params(arrays)
            misfit = describe_misfit(given, state.params)
        except (MalformedReplyError, AttributeError) as error:
            misfit = str(error)
        if misfit:
            self._fail("aggregate_train", f"what it returned does not fit the model: {misfit}")
        params = {name: given[name].to(tensor.dtype) for name, tensor in state.params.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in params.values()):
            self._fail("aggregate_train", "the model it returned holds NaN or infinite values")
        memory = self._remembered()
        self._last = memory
        return Step(
            params=params, memory=memory, metrics=figures_of(metrics, "") if metrics else {}
        )

    def _call(self, method: str, call: Callable[[], _T]) -> _T:
        try:
            with _quiet(), _frozen_heap():
                return call()
        except FlAppError:
            raise
        except Exception as error:
            raise StrategyError(
                f"strategy {type(self.strategy).__name__} failed in {method}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _fail(self, method: str, why: str) -> NoReturn:
        raise StrategyError(f"strategy {type(self.strategy).__name__} failed in {method}: {why}.")

    def _recall(self, memory: Memory | None) -> None:
        """Bring the strategy to where it was when it had this memory."""
        if memory is self._last and memory is not None:
            return
        attributes = vars(self.strategy)
        for name in set(attributes) - set(self._initial):
            del attributes[name]
        attributes.update({name: _kept(value) for name, value in self._initial.items()})
        if memory is not None:
            attributes.update({name: _from_tree(value) for name, value in memory.items()})

    def _remembered(self) -> Memory:
        """Return the strategy's attributes that are no longer as they were made, as a tree."""
        memory = {}
        for name, value in vars(self.strategy).items():
            try:
                memory[name] = _to_tree(value)
            except TypeError as error:
                if name in self._initial and value is self._initial[name]:
                    continue  # a function it was made with, or the like
                raise StrategyError(
                    f"strategy {type(self.strategy).__name__} keeps in its attribute {name} what "
                    f"no checkpoint can hold ({error}): keep numbers, strings, arrays, and lists "
                    "and dicts of them."
                ) from error
        return memory


def as_algorithm(named: Any, keys: Iterable[str]) -> Any:
    """Return what ``strategy`` names: a strategy of Flower's as an algorithm, the rest as it is.

    Args:
        named: What the configuration has built.
        keys: Keys that the configuration gives for it.

    Raises:
        ConfigError: One of the keys is for what is ours to decide; or it cannot serve.
    """
    if not isinstance(named, Strategy):
        return named
    for key in keys:
        if key in _OURS:
            raise ConfigError(
                f"strategy.{key} has no say here: {_OURS[key]}. Leave strategy.{key} out."
            )
    algorithm: Algorithm = FlowerAlgorithm(strategy=named)
    return algorithm


class _Cohort(Grid):
    """The Grid that a strategy sees: its nodes are the cohort, and nothing can be sent."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = nodes
        self._looks = 0

    def get_node_ids(self) -> Iterable[int]:
        """Return the cohort's nodes.

        Raises:
            StrategyError: The strategy waits for more of them, which will not come.
        """
        self._looks += 1
        if self._looks > 4:
            raise StrategyError(
                f"the strategy waits for more clients than the {len(self._nodes)} of this round. "
                "Enlarge the cohort (selection.fraction), or lower what the strategy asks for."
            )
        return list(self._nodes)

    def set_run(self, run: Run) -> None:
        """Refuse."""
        self._refuse()

    @property
    def run(self) -> Run:
        """Nothing: there is no run to see."""
        self._refuse()

    def create_message(self, *_: object, **__: object) -> Message:
        """Refuse."""
        self._refuse()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refuse."""
        self._refuse()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refuse."""
        self._refuse()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Refuse."""
        self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise StrategyError("a strategy may not reach clients by itself: it is asked what to send.")


def _node(client: ClientId) -> int:
    """Return the number by which strategies know a client: of 63 bits, as Flower's are."""
    return int.from_bytes(hashlib.sha256(client.encode()).digest()[:8], "big") >> 1


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Keep what Flower tells of every round for the block; its warnings are shown."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _frozen_heap() -> Generator[None, None, None]:
    """Have the garbage collector look at nothing older than the block.

    Flower runs a full collection for each reply of some strategies (QFedAvg, Bulyan), which goes
    over all that torch and others have imported: a tenth of a second each time.
    """
    if gc.get_freeze_count():
        yield  # somebody else's frozen heap stays frozen
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _kept(value: Any) -> Any:
    """Return a copy of an attribute if a tree can hold it, else itself."""
    try:
        _to_tree(value)
    except TypeError:
        return value
    return deepcopy(value)


def _to_tree(value: Any) -> Any:
    """Return a copy of a value in terms of what `fl_app.storage` keeps.

    Raises:
        TypeError: It has no such form.
    """
    if isinstance(value, ArrayRecord):
        return {_RECORD: dict(decode_params(value))}
    if isinstance(value, np.ndarray):
        return {_ARRAY: torch.from_numpy(value.copy())}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {_to_tree(key): _to_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_tree(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__}")


def _from_tree(tree: Any) -> Any:
    """Return the value that `_to_tree` was given, as a copy."""
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, list | tuple):
        return type(tree)(_from_tree(item) for item in tree)
    if not isinstance(tree, Mapping):
        return tree
    if _RECORD in tree:
        return encode_params(tree[_RECORD])
    if _ARRAY in tree:
        return tree[_ARRAY].numpy().copy()
    return {key: _from_tree(item) for key, item in tree.items()}
