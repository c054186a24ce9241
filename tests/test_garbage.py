import gc

from dynamo_serve import garbage


def test_what_start_up_made_is_never_looked_through_again() -> None:
    threshold = gc.get_threshold()
    try:
        garbage.settle()
        assert gc.get_freeze_count() > 0
        assert gc.get_objects(generation=2) == []
        assert gc.get_threshold()[0] == garbage.YOUNG
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)
