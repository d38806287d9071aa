"""What workers wait for, as a run's folder tells it."""

import os
import time

from pipelines.waiting import Board, Notices, board, is_told, patiently, tell, told


def test_a_board_holds_the_last_text_as_far_as_it_fits():
    descriptor = board()
    writer, reader = Board(descriptor), Board(descriptor)
    os.close(descriptor)
    assert reader.read() == ""
    for text in ("s3://a: längst", "short", "x" * 5000, ""):
        writer.write(text)
        assert reader.read() == text[:1023]


def test_a_notice_is_there_until_it_is_taken_back(tmp_path):
    notices = Notices(tmp_path)
    assert notices.read() == []
    notices.post("s3://a: it is away")
    assert notices.read() == ["s3://a: it is away"]
    notices.post("")
    assert notices.read() == []
    notices.clear()
    assert not list(tmp_path.iterdir())


def test_a_notice_of_a_worker_that_was_killed_grows_old(tmp_path):
    notices = Notices(tmp_path)
    notices.post("s3://a: it is away")
    (path,) = notices.folder.iterdir()
    old_s = time.time() - 60
    os.utime(path, (old_s, old_s))
    assert notices.read() == []


def test_blocks_may_end_in_any_order_and_leave_nothing():
    said = []
    first, second = told(said.append), told(lambda text: said.append(text.upper()))
    first.__enter__()
    second.__enter__()
    tell("a")
    first.__exit__(None, None, None)  # as another thread may
    tell("b")
    second.__exit__(None, None, None)
    tell("c")
    assert said == ["A", "B"] and not is_told()
    with patiently():
        assert is_told()
    assert not is_told()
