"""Tests which variants of layers get compiled graphs, how many are kept, and which are dropped.

A variant is a set of edited sites. Its graphs are made if it is expected, or if many steps want it.
"""

import gc
import weakref

from server.engine.torch.cpu.graph_store import RECURRENCE, GraphStore
from server.engine.torch.cpu.layer_graphs import EditedSite, Graphs, Variant
from server.engine.torch.cpu.recurring import RecurrenceRule
from steering.site_maps import MapPart
from steering.sites import SiteLocation

PLAIN = Variant(0)


def variant(number: int) -> Variant:
    return Variant(
        0, (EditedSite(SiteLocation(f"part{number}", False), 9, 32, frozenset({MapPart.MAP})),), 1
    )


class Compiler:
    """A store, its clock, and a stand-in for the compiler that makes dummy graphs on demand."""

    def __init__(self, rule: RecurrenceRule = RECURRENCE, max_graphs: int = 3) -> None:
        self.now = 0.0
        self.asked: list[Variant] = []
        self.store = GraphStore(self.asked.append, rule, max_graphs, lambda: self.now)

    def make_all(self) -> None:
        for each in self.asked:
            if not self.store.has_graphs(each):
                self.store.set_graphs(each, Graphs(lambda *_: 1, lambda *_: 2))

    def steps(self, wanted: Variant, number: int, seconds: float = 0.05) -> None:
        for _ in range(number):
            self.now += seconds
            self.store.find(wanted)


def test_what_is_expected_is_made_at_once_and_never_goes() -> None:
    compiler = Compiler(max_graphs=1)
    for _ in range(2):
        compiler.store.precompile(PLAIN)
    assert compiler.asked == [PLAIN]
    assert compiler.store.find(PLAIN) is None
    compiler.make_all()
    for number in range(3):
        compiler.steps(variant(number), 3000)
        compiler.make_all()
        compiler.now += 1e6
    assert compiler.store.find(PLAIN) is not None


def test_nine_artifacts_that_are_used_once_make_no_graph() -> None:
    compiler = Compiler()
    for number in range(9):
        compiler.steps(variant(number), 512)
    assert compiler.asked == []


def test_a_mix_that_recurs_gets_its_graphs() -> None:
    compiler = Compiler()
    compiler.steps(variant(1), 2000)
    assert compiler.asked == [variant(1)]
    compiler.make_all()
    assert compiler.store.find(variant(1)) is not None


def test_there_are_so_many_at_most_and_those_in_use_stay() -> None:
    compiler = Compiler(RecurrenceRule.at_once())
    for number in range(3):
        compiler.store.find(variant(number))
    compiler.make_all()
    for _ in range(1000):  # 250 seconds; a variant is dropped after 300 without use
        for number in range(5):
            compiler.steps(variant(number), 1)
    assert compiler.asked == [variant(number) for number in range(3)]
    compiler.steps(variant(0), 1)
    compiler.steps(variant(2), 1)
    compiler.now += 400
    compiler.steps(variant(0), 1)
    compiler.store.find(variant(4))
    assert compiler.asked[-1] == variant(4)
    assert not compiler.store.has_graphs(variant(1)), "the least recently used should have gone"
    assert compiler.store.has_graphs(variant(0))
    assert compiler.store.has_graphs(variant(2))


def test_what_is_being_made_is_waited_for() -> None:
    compiler = Compiler(RecurrenceRule.at_once(), max_graphs=1)
    compiler.store.find(variant(0))
    compiler.now += 1000
    compiler.store.find(variant(1))
    assert compiler.asked == [variant(0)]
    compiler.make_all()
    compiler.store.find(variant(1))
    assert compiler.asked == [variant(0), variant(1)]


def test_what_could_not_be_made_is_not_tried_again_while_it_is_wanted() -> None:
    compiler = Compiler(RecurrenceRule.at_once())
    compiler.store.find(variant(0))
    compiler.store.set_graphs(variant(0), None)
    compiler.steps(variant(0), 5000)
    assert compiler.asked == [variant(0)]
    assert compiler.store.find(variant(0)) is None


def test_the_memory_of_what_goes_is_free() -> None:
    compiler = Compiler(RecurrenceRule.at_once(), max_graphs=1)
    compiler.store.find(variant(0))
    compiler.make_all()
    graphs = compiler.store.find(variant(0))
    assert graphs is not None
    made = weakref.ref(graphs.one_token)
    del graphs
    compiler.now += 1000
    compiler.store.find(variant(1))
    gc.collect()
    assert made() is None
