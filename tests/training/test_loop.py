from aigc_tf.training.loop import split_into_blocks


def test_steps_that_do_not_fill_whole_blocks_end_with_a_smaller_one():
    assert split_into_blocks(2003, 16) == [(2000, 16), (3, 3)]
    assert split_into_blocks(7, 16) == [(7, 7)]
    assert split_into_blocks(32, 16) == [(32, 16)]
