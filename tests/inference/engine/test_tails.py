from mlx_manager.inference.engine.prefix import num_alike
from mlx_manager.inference.engine.tails import Tails


def test_tails_are_found_after_their_prefix_alone() -> None:
    tails = Tails(3)
    names = [tails.put(b"a", [1, 2, 3]), tails.put(b"a", [1, 4])]
    assert list(tails.after(b"a")) == [(names[0], (1, 2, 3)), (names[1], (1, 4))]
    assert list(tails.after(b"b")) == []


def test_two_are_alike_up_to_where_they_differ() -> None:
    assert [num_alike([1, 2, 3], other) for other in ([1, 2, 3, 4], [1, 2, 4, 3], [2], [])] == [3, 2, 0, 0]


def test_names_are_those_of_no_block() -> None:
    assert Tails(1).put(b"a", [1]) == -1


def test_who_goes_on_from_a_tail_leaves_a_longer_one_in_its_place() -> None:
    tails = Tails(3)
    assert tails.put(b"a", [1]) == tails.put(b"a", [1, 2])
    assert list(tails.after(b"a")) == [(-1, (1, 2))]


def test_what_is_known_already_is_not_saved_again() -> None:
    tails = Tails(2)
    tails.put(b"a", [1, 2, 3])
    assert tails.put(b"a", [1, 2]) is None
    assert list(tails.after(b"a")) == [(-1, (1, 2, 3))]
    assert tails.put(b"a", []) is None


def test_the_least_recently_used_gives_its_name_to_the_newest() -> None:
    tails = Tails(2)
    assert [tails.put(prefix, [1]) for prefix in (b"a", b"b")] == [-1, -2]
    tails.use(-1)
    assert tails.put(b"c", [1]) == -2
    assert [list(tails.after(prefix)) for prefix in (b"a", b"b", b"c")] == [[(-1, (1,))], [], [(-2, (1,))]]


def test_none_are_kept_where_there_is_no_room() -> None:
    assert Tails(0).put(b"a", [1]) is None


def test_forgotten_ones_are_named() -> None:
    tails = Tails(3)
    for prefix in (b"a", b"b"):
        tails.put(prefix, [1])
    assert sorted(tails.clear()) == [-2, -1]
    assert list(tails.after(b"a")) == []
    assert tails.put(b"c", [1]) == -1
