"""Plans of several processes."""

from tests.faults.harness import LAST, assert_same_state

ONE_EPOCH = ("TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0")


def test_processes_agree_on_the_batch_that_fits_all(starter, reference, tmp_path):
    """Two processes, the second with less memory: the batch that fits it, in the bits of one written by hand."""
    expected = reference("DATA.BATCH_SIZE=2", "TRAIN.ACCUMULATION_STEPS=4", *ONE_EPOCH, world=2)
    words = ("TRAIN.GLOBAL_BATCH=16", *ONE_EPOCH)
    job = starter.run(*words, out=tmp_path, world=2, faults=[("room_for", {"images": 2, "rank": 1})]).assert_ok()
    assert "TRAIN.GLOBAL_BATCH 16: 2 per process and forward pass, accumulation 4" in job.text()
    assert_same_state(job.folder / LAST, expected)
