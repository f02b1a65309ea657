"""A round's replies: the good ones count in any order, the bad ones only as failures."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fl_app import codec
from fl_app.aggregation import WeightedMean
from fl_app.algorithm import Composition, ServerState
from fl_app.directory import QueryDirectory
from fl_app.engines.local import adopt_identity
from fl_app.engines.local_grid import LocalDirectory
from fl_app.objective import OwnLoss
from fl_app.selection import RoundRobin, Selector
from fl_app.server_optimizer import OptimizerFactory
from fl_app.storage import read_tree, write_tree
from fl_app.strategy import FederatedStrategy
from fl_app.tasks.federated import ClientRange
from fl_app.types import (
    ClientDescription,
    ClientUpdate,
    ConfigError,
    EmptyCohortError,
    Evaluation,
    FailureKind,
    Params,
)
from fl_app.validation import UpdateChecks

MODEL: Params = {"w": torch.tensor([1.0, 2.0]), "mean": torch.tensor([0.5])}
SGD = partial(torch.optim.SGD, lr=1.0)


@pytest.fixture(autouse=True)
def flower_knows_its_task() -> None:
    adopt_identity()


def strategy(
    num_clients: int = 4,
    *,
    selector: Selector | None = None,
    server_optimizer: OptimizerFactory = SGD,
    directory: Any = None,
    **checks: Any,
) -> FederatedStrategy:
    return FederatedStrategy(
        algorithm=Composition(
            aggregation=WeightedMean(),
            server_optimizer=server_optimizer,
            objective=OwnLoss(),
            name="test",
        ),
        selector=selector or RoundRobin(fraction=1.0),
        checks=UpdateChecks(**checks),
        directory=directory or LocalDirectory(ClientRange(num_clients)),
        initial=MODEL,
        trainable=frozenset("w"),
        seed=1,
    )


def asked(played: FederatedStrategy, round: int = 1) -> list[Message]:
    return played.configure_train(round, played.current_arrays(), ConfigRecord(), None)


def good(
    instruction: Message, value: float = 1.0, *, num_examples: int = 10, **changed: Tensor | None
) -> Message:
    """Return a good reply but for the tensors given; None leaves one out."""
    delta = {name: torch.full_like(tensor, value) for name, tensor in MODEL.items()} | changed
    update = ClientUpdate(
        client="whatever it says",
        round=1,
        delta={name: tensor for name, tensor in delta.items() if tensor is not None},
        num_examples=num_examples,
        metrics={"loss": value},
        evaluation=Evaluation(num_examples=2, metrics={"accuracy": value / 10}),
    )
    return Message(codec.encode_update(update), reply_to=instruction)


def equal(first: Params, second: Params) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def failures(played: FederatedStrategy) -> dict[str, FailureKind]:
    return {failure.client: failure.kind for failure in played.last_report().failures}


# Good rounds --------------------------------------------------------------------------------------


def test_a_round_moves_the_model_by_the_weighted_mean_and_reports_it() -> None:
    played = strategy(2)
    first, second = asked(played)
    arrays, metrics = played.aggregate_train(
        1, [good(first, 1.0, num_examples=10), good(second, 4.0, num_examples=20)]
    )
    assert played.state.params["w"].tolist() == [4.0, 5.0]
    assert played.state.params["mean"].tolist() == [3.5]
    assert equal(codec.decode_params(arrays), played.state.params)
    report = played.last_report()
    assert (report.round, report.cohort, report.num_updates) == (1, ("0", "1"), 2)
    assert report.applied
    assert report.failures == ()
    assert report.client_metrics == pytest.approx({"train_loss": 3.0, "test_accuracy": 0.25})
    assert report.client_metrics == metrics
    assert report.client_accuracy == {"0": 0.1, "1": 0.4}
    assert (report.uplink_bytes, report.downlink_bytes) == (24, 24)
    assert MODEL["w"].tolist() == [1.0, 2.0]


def test_buffers_are_averaged_whatever_the_server_optimizer() -> None:
    played = strategy(2, server_optimizer=partial(torch.optim.Adam, lr=0.01))
    replies = [good(message, value) for message, value in zip(asked(played), (1, 3), strict=True)]
    played.aggregate_train(1, replies)
    assert played.state.params["mean"].tolist() == [2.5]
    torch.testing.assert_close(played.state.params["w"], torch.tensor([1.01, 2.01]))


@given(st.permutations(range(5)), st.lists(st.floats(-9, 9, width=32), min_size=5, max_size=5))
def test_replies_in_any_order_give_the_same_bits(order, values) -> None:
    adopt_identity()

    def play(order: Sequence[int]) -> FederatedStrategy:
        played = strategy(5, server_optimizer=partial(torch.optim.Adam, lr=0.01))
        messages = asked(played)
        replies = [good(messages[k], values[k], num_examples=3 + 7 * k) for k in order]
        played.aggregate_train(1, replies)
        return played

    in_order, shuffled = play(range(5)), play(order)
    assert equal(in_order.state.params, shuffled.state.params)
    assert in_order.last_report() == shuffled.last_report()


def test_a_bad_reply_in_any_place_costs_itself_alone() -> None:
    models = []
    for order in permutations(range(3)):
        played = strategy(3)
        messages = asked(played)
        replies = [good(messages[0]), good(messages[1], math.nan), good(messages[2], 2.0)]
        played.aggregate_train(1, [replies[k] for k in order])
        models.append(played.state.params)
        assert failures(played) == {"1": FailureKind.REJECTED}
    assert all(equal(models[0], model) for model in models)
    assert models[0]["w"].tolist() == [2.5, 3.5]


def test_the_state_of_the_server_optimizer_goes_on_from_round_to_round() -> None:
    played = strategy(1, server_optimizer=partial(torch.optim.SGD, lr=1.0, momentum=0.5))
    for round in (1, 2):
        (message,) = asked(played, round)
        played.aggregate_train(round, [good(message)])
    assert played.state.round == 2
    assert played.state.params["w"].tolist() == [1 + 1 + 1.5, 2 + 1 + 1.5]


def test_a_resumed_strategy_goes_on_to_the_same_bits(tmp_path) -> None:
    def make() -> FederatedStrategy:
        return strategy(2, server_optimizer=partial(torch.optim.Adam, lr=0.01))

    def play(played: FederatedStrategy, *rounds: int) -> None:
        for round in rounds:
            replies = [
                good(m, 0.1 * round + n) for n, m in enumerate(asked(played, round), start=1)
            ]
            played.aggregate_train(round, replies)

    whole, first, second = make(), make(), make()
    play(whole, 1, 2, 3, 4)
    play(first, 1, 2)
    write_tree(tmp_path / "t", first.state.to_tree())
    second.resume(ServerState.from_tree(read_tree(tmp_path / "t")))
    play(second, 3, 4)
    assert equal(whole.state.params, second.state.params)
    assert whole.last_report() == second.last_report()


# Bad replies --------------------------------------------------------------------------------------

BAD_UPDATES: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({"value": math.nan}, "NaN"),
    "inf": ({"w": torch.tensor([0.0, math.inf])}, "NaN or infinite"),
    "NaN in a buffer": ({"mean": torch.tensor([math.nan])}, "NaN"),
    "missing": ({"w": None}, "missing w"),
    "extra": ({"more": torch.zeros(1)}, "unexpected more"),
    "other shape": ({"w": torch.zeros(3)}, "shape (3,)"),
    "broadcastable shape": ({"w": torch.zeros(1)}, "shape (1,)"),
    "huge": ({"value": 1e6}, "above checks.max_norm"),
    "integers": ({"w": torch.zeros(2, dtype=torch.int32)}, "int32"),
    "float64": ({"w": torch.zeros(2, dtype=torch.float64)}, "float64"),
    "float16": ({"w": torch.zeros(2, dtype=torch.float16)}, "float16"),
    "no records": ({"num_examples": 0}, "num_examples=0"),
    "negative records": ({"num_examples": -5}, "num_examples=-5"),
    "all the records there are": ({"num_examples": 10**12}, "num_examples=1000000000000"),
    "a long name": ({"x\n" * 10_000: torch.zeros(1)}, "unexpected"),
}


@pytest.mark.parametrize(("changed", "words"), BAD_UPDATES.values(), ids=BAD_UPDATES.keys())
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_bad_update_is_rejected_and_the_rest_aggregated(changed, words, culprit) -> None:
    played = strategy(3)
    replies = [
        good(message, **(changed if number == culprit else {}))
        for number, message in enumerate(asked(played))
    ]
    arrays, _ = played.aggregate_train(1, replies)
    assert arrays is not None
    assert played.state.params["w"].tolist() == [2.0, 3.0]
    assert played.state.params["w"].dtype == torch.float32
    (failure,) = played.last_report().failures
    assert (failure.client, failure.kind) == (str(culprit), FailureKind.REJECTED)
    assert words in failure.reason
    assert len(failure.reason) <= 500
    assert len(failure.reason.splitlines()) == 1
    assert played.last_report().num_updates == 2


def malformed(instruction: Message) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"x": 1})}), reply_to=instruction)


def failed(instruction: Message, code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION) -> Message:
    error = Error(code=code, reason="Traceback ...\nRuntimeError: boom")
    return Message(error, reply_to=instruction)


def test_each_way_to_fail_is_counted_by_its_kind() -> None:
    played = strategy(7)
    messages = asked(played)
    replies = [
        good(messages[0]),
        malformed(messages[1]),
        failed(messages[2]),
        failed(messages[3], ErrorCode.NODE_UNAVAILABLE),
        failed(messages[4], ErrorCode.MESSAGE_UNAVAILABLE),
        good(messages[5], math.nan),
    ]
    played.aggregate_train(1, replies)
    assert failures(played) == {
        "1": FailureKind.REJECTED,
        "2": FailureKind.ERROR,
        "3": FailureKind.OFFLINE,
        "4": FailureKind.TIMEOUT,
        "5": FailureKind.REJECTED,
        "6": FailureKind.TIMEOUT,
    }
    reasons = {f.client: f.reason for f in played.last_report().failures}
    assert reasons["2"] == "RuntimeError: boom"
    assert reasons["6"] == "no reply in time"
    assert list(reasons) == sorted(reasons)
    assert played.state.params["w"].tolist() == [2.0, 3.0]


@pytest.mark.parametrize("num_good", [0, 1, 2, 3])
def test_with_too_few_good_replies_the_model_stays_as_it_was(num_good) -> None:
    played = strategy(
        3, selector=RoundRobin(fraction=1.0, min_replies=2), server_optimizer=torch.optim.Adam
    )
    before = played.state
    replies = [good(m) if n < num_good else good(m, math.nan) for n, m in enumerate(asked(played))]
    arrays, _ = played.aggregate_train(1, replies)
    applied = num_good >= 2
    assert played.last_report().applied is applied
    assert (arrays is not None) is applied
    assert equal(played.state.params, before.params) is not applied
    assert (played.state.memory is not None) is applied
    assert played.state.round == 1
    assert played.last_report().num_updates == num_good


def test_a_round_without_any_reply_keeps_the_old_model() -> None:
    played = strategy(2)
    asked(played)
    assert played.aggregate_train(1, []) == (None, None)
    assert equal(played.state.params, MODEL)
    assert set(failures(played).values()) == {FailureKind.TIMEOUT}


# Over-selection -----------------------------------------------------------------------------------


def no_further(replies: Iterable[Message]) -> Iterator[Message]:
    """Yield these replies, and fail when asked for one more."""
    yield from replies
    raise AssertionError("a reply was asked for that was not needed")


def test_over_selection_consumes_no_more_replies_than_wanted() -> None:
    played = strategy(10, selector=RoundRobin(count=3, over_selection=0.7))
    messages = asked(played)
    assert len(messages) == 6
    played.aggregate_train(1, no_further([good(m) for m in messages[:3]]))
    report = played.last_report()
    assert report.num_updates == 3
    assert len(report.cohort) == 6
    assert report.failures == ()


def test_a_failure_is_made_up_for_by_one_of_the_over_selected() -> None:
    played = strategy(10, selector=RoundRobin(count=2, over_selection=1.0))
    messages = asked(played)
    replies = [failed(messages[0]), good(messages[1]), good(messages[2])]
    played.aggregate_train(1, no_further(replies))
    assert played.last_report().num_updates == 2
    assert failures(played) == {"0": FailureKind.ERROR}


# Replies that nobody asked for --------------------------------------------------------------------


def from_node(node: int, value: float) -> Message:
    return good(Message(RecordDict(), node, MessageType.TRAIN, group_id="1"), value)


def test_unasked_and_second_replies_are_ignored() -> None:
    played = strategy(3, selector=RoundRobin(count=2))
    first, second = asked(played)
    replies = [
        from_node(3, 100.0),  # a client that is not in the cohort
        from_node(99, 100.0),  # no client at all
        good(first, 1.0),
        good(first, 100.0),
        failed(first),
        good(second, 3.0),
    ]
    played.aggregate_train(1, replies)
    assert played.state.params["w"].tolist() == [3.0, 4.0]
    report = played.last_report()
    assert (report.num_updates, report.failures) == (2, ())
    assert report.cohort == ("0", "1")


def test_a_client_whose_reply_was_rejected_has_no_second_chance() -> None:
    played = strategy(2)
    first, second = asked(played)
    played.aggregate_train(1, [good(first, math.nan), good(first, 50.0), good(second, 3.0)])
    assert played.state.params["w"].tolist() == [4.0, 5.0]
    assert failures(played) == {"0": FailureKind.REJECTED}


def test_what_a_reply_says_of_its_sender_is_not_trusted() -> None:
    played = strategy(2)
    first, second = asked(played)
    lying = good(first, 1.0)
    lying.content["client"] = ConfigRecord({"client-id": "1", "num-examples": 10**6})
    played.aggregate_train(1, [lying, good(second, 3.0)])
    assert played.last_report().client_accuracy == {"0": 0.1, "1": 0.3}


def test_a_broken_figure_of_one_client_does_not_stop_the_round() -> None:
    played = strategy(2)
    first, second = asked(played)
    broken = good(first)
    broken.content["metrics"]["train-loss"] = math.nan
    played.aggregate_train(1, [broken, good(second)])
    assert played.last_report().num_updates == 2


# Cohorts ------------------------------------------------------------------------------------------


def test_without_any_client_there_is_no_round() -> None:
    with pytest.raises(EmptyCohortError, match="Round 1: no client is connected"):
        asked(strategy(0))


def test_a_report_before_the_first_round_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="No round"):
        strategy().last_report()


def test_a_cohort_larger_than_the_population_is_refused() -> None:
    with pytest.raises(ConfigError, match="selection.count=9"):
        asked(strategy(4, selector=RoundRobin(count=9)))


# Nodes that come and go ---------------------------------------------------------------------------

Answer = Callable[[Message], Message | None]


def named(client: str) -> Answer:
    return lambda m: Message(
        codec.encode_description(ClientDescription(client=client, num_examples=1)), reply_to=m
    )


class Nodes:
    """A Grid of nodes that answer, each as its function says; it counts how often each is asked."""

    def __init__(self, **answers: Answer) -> None:
        self.connected: dict[int, Answer] = {int(k[1:]): v for k, v in answers.items()}
        self.questions: list[int] = []
        self._asked: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.connected)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._asked = list(messages)
        for number, message in enumerate(self._asked):
            message.metadata.__dict__["_message_id"] = f"{number}"
        self.questions += [message.metadata.dst_node_id for message in self._asked]
        return [message.metadata.message_id for message in self._asked]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked, self._asked = self._asked, []
        answers = [self.connected[m.metadata.dst_node_id](m) for m in asked]
        return [answer for answer in answers if answer is not None]


def known(directory: QueryDirectory) -> dict[str, int | None]:
    return {client: directory.node_of(client) for client in directory.clients()}


def test_each_node_is_asked_once_and_clients_are_in_canonical_order() -> None:
    grid = Nodes(n7=named("10"), n3=named("2"))
    directory = QueryDirectory(grid)
    assert list(known(directory).items()) == [("2", 3), ("10", 7)]
    grid.connected[5] = named("b")
    assert list(known(directory).items()) == [("2", 3), ("b", 5), ("10", 7)]
    assert sorted(grid.questions) == [3, 5, 7]


def test_a_client_that_is_away_keeps_its_place_and_is_found_on_its_new_node() -> None:
    grid = Nodes(n1=named("a"), n2=named("b"))
    directory = QueryDirectory(grid)
    directory.clients()
    del grid.connected[1]
    assert known(directory) == {"a": None, "b": 2}
    grid.connected[9] = named("a")
    assert known(directory) == {"a": 9, "b": 2}


def test_a_node_that_is_back_under_its_old_number_is_its_client_again() -> None:
    grid = Nodes(n1=named("a"), n2=named("b"))
    directory = QueryDirectory(grid)
    directory.clients()
    away = grid.connected.pop(1)
    assert known(directory) == {"a": None, "b": 2}
    grid.connected[1] = away
    assert known(directory) == {"a": 1, "b": 2}


def test_the_first_of_two_nodes_with_one_name_is_the_client(caplog) -> None:
    grid = Nodes(n1=named("a"), n2=named("a"))
    directory = QueryDirectory(grid)
    with caplog.at_level(logging.WARNING):
        assert known(directory) == {"a": 1}
    assert "Node 2 says it is client a, which is connected already" in caplog.text
    assert known(directory) == {"a": 1}
    del grid.connected[1]
    assert known(directory) == {"a": 2}


def test_a_client_that_moved_is_not_moved_back_by_its_old_node() -> None:
    grid = Nodes(n1=named("a"))
    directory = QueryDirectory(grid)
    directory.clients()
    old = grid.connected.pop(1)
    grid.connected[2] = named("a")
    assert known(directory) == {"a": 2}
    grid.connected[1] = old
    assert known(directory) == {"a": 2}


def test_nodes_that_do_not_say_who_they_are_are_no_clients(caplog) -> None:
    grid = Nodes(
        n1=named("a"),
        n2=failed,
        n3=lambda m: Message(RecordDict(), reply_to=m),
        n4=lambda m: Message(RecordDict({"client": ConfigRecord({"client-id": 5})}), reply_to=m),
        n5=named(""),
        n6=lambda m: None,
    )
    with caplog.at_level(logging.WARNING):
        assert known(QueryDirectory(grid, timeout_s=0.3)) == {"a": 1}
    assert [f"Node {n} does not say" in caplog.text for n in range(1, 7)] == [
        *(False, True, True, True, True, False)
    ]


def test_a_node_that_failed_to_answer_is_asked_again() -> None:
    grid = Nodes(n1=failed)
    directory = QueryDirectory(grid)
    assert known(directory) == {}
    grid.connected[1] = named("a")
    assert known(directory) == {"a": 1}


def test_a_silent_node_is_not_asked_in_every_round() -> None:
    questions = []

    def silent(message: Message) -> None:
        questions.append(message)

    directory = QueryDirectory(Nodes(n1=named("a"), n2=silent), retry_s=3600.0, timeout_s=0.02)
    assert known(directory) == known(directory) == {"a": 1}
    assert len(questions) == 1
    patient = QueryDirectory(Nodes(n1=named("a"), n2=silent), retry_s=0.0, timeout_s=0.02)
    assert known(patient) == known(patient) == {"a": 1}
    assert len(questions) >= 3


def test_a_reply_to_another_round_is_rejected() -> None:
    played = strategy(2)
    late = [good(message) for message in asked(played, round=1)]
    first, _ = asked(played, round=2)
    played.aggregate_train(2, [good(first), late[1]])
    assert failures(played) == {"1": FailureKind.REJECTED}
    assert "answers round 1" in played.last_report().failures[0].reason


def test_a_client_that_is_away_when_drawn_is_offline_and_the_others_go_on() -> None:
    grid = Nodes(n1=named("a"), n2=named("b"))
    played = strategy(directory=QueryDirectory(grid))
    assert len(asked(played)) == 2
    del grid.connected[1]
    (message,) = asked(played)
    played.aggregate_train(1, [good(message)])
    report = played.last_report()
    assert report.cohort == ("a", "b")
    assert failures(played) == {"a": FailureKind.OFFLINE}
    assert report.num_updates == 1
    assert report.downlink_bytes == 12


def test_a_node_that_joins_during_a_round_does_not_change_it() -> None:
    grid = Nodes(n1=named("a"), n2=named("b"))
    played = strategy(directory=QueryDirectory(grid))
    messages = asked(played)
    grid.connected[3] = named("c")
    played.aggregate_train(1, no_further([good(m) for m in messages]))
    assert played.last_report().num_updates == 2
    assert grid.questions == [1, 2]


# The clients' evaluation --------------------------------------------------------------------------


def test_clients_that_do_not_measure_are_left_out_of_the_evaluation() -> None:
    class Measuring(Nodes):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            measured = Evaluation(num_examples=3, metrics={"accuracy": 0.5})
            of_2, of_0, of_1 = self._asked
            unasked = Message(RecordDict(), 99, MessageType.EVALUATE)
            replies = [
                Message(codec.encode_evaluation(measured), reply_to=m)
                for m in (of_1, of_2, unasked)
            ]
            return [*replies, malformed(of_0)]

    played = strategy(4)
    measured = played.evaluate_clients(Measuring(), ["2", "0", "1", "unknown"])
    assert list(measured) == ["1", "2"]  # client 0's reply is malformed, node 99's unasked
    assert all(entry.metrics == {"accuracy": 0.5} for entry in measured.values())
