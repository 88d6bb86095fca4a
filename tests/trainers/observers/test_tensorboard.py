from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainwright.trainers.observers.tensorboard import TensorBoard


def read(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_metrics_are_scalars_under_their_names_and_events_are_text(tmp_path, drive):
    drive(TensorBoard(tmp_path), last=3, events=[("checkpoint", {"path": "a_b_c"})], at_2={"val_loss": 2.5})
    events = read(tmp_path)
    assert [point.step for point in events.Scalars("loss")] == [1, 2, 3]
    assert [(point.step, point.value) for point in events.Scalars("val_loss")] == [(2, 2.5)]
    assert "step" not in events.Tags()["scalars"]
    (text,) = events.Tensors("events/checkpoint/text_summary")
    assert b"a_b_c" in text.tensor_proto.string_val[0]


def test_a_spike_stands_where_it_began(tmp_path, drive):
    drive(TensorBoard(tmp_path), first=5, events=[("spike", {"step": 3, "length": 2, "height": 9.0})])
    assert [(point.step, point.value) for point in read(tmp_path).Scalars("spike_length")] == [(3, 2.0)]


def test_a_resumed_run_has_each_step_once(tmp_path, drive):
    drive(TensorBoard(tmp_path), last=5, stop=None)
    drive(TensorBoard(tmp_path), first=4, last=6)
    assert [point.step for point in read(tmp_path).Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_run_from_the_start_again_has_only_its_own_steps(tmp_path, drive):
    drive(TensorBoard(tmp_path), last=5)
    drive(TensorBoard(tmp_path), last=2)
    assert [point.step for point in read(tmp_path).Scalars("loss")] == [1, 2]
