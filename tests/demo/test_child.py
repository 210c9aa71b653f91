"""One real vLLM engine: what it answers, counts and raises. Needs vLLM in this environment."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cachesvc.demo import child
from cachesvc.demo.engine import EngineDiedError, EngineProcess, EngineRaisedError
from cachesvc.demo.model import HYBRID, TINY, write_lora, write_model

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
PROMPT = [3 + 7 * n % 2000 for n in range(1000)]


def other(seed: int, length: int = 1000) -> list[int]:
    """A prompt that shares no block with others."""
    return [3 + (seed * 577 + n * n) % 2000 for n in range(length)]


def hello(llm: Any, **more: Any) -> dict[str, Any]:
    """Called in the child by a test."""
    return {"model": llm.llm_engine.vllm_config.model_config.model, **more}


def break_scheduler(llm: Any) -> None:
    """From now on no step works."""
    del llm.llm_engine.engine_core.engine_core.scheduler.running


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def engine(models: Path) -> Iterator[EngineProcess]:
    adapters = {"enable_lora": True, "max_lora_rank": 8}
    with EngineProcess.start(write_model(models / "tiny", TINY), adapters) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        engine.auto_step(True)
        engine.settle()
        assert engine.state() == {"work": False, "requests": {}}


def test_importing_it_imports_no_vllm() -> None:
    assert not {"vllm", "torch"} & set(vars(child))


@needs_vllm
def test_cold_then_local_hit(engine: EngineProcess) -> None:
    [cold] = engine.generate([PROMPT], logprobs=True)
    [hit] = engine.generate([PROMPT], logprobs=True)
    assert (cold.prompt_tokens, cold.computed_tokens, cold.local_tokens, cold.loaded_tokens) == (1000, 1000, 0, 0)
    assert (hit.computed_tokens, hit.local_tokens, hit.loaded_tokens) == (104, 896, 0)
    assert cold.token_ids == hit.token_ids
    assert hit.logprobs == pytest.approx(cold.logprobs, abs=1e-3)
    assert len(set(cold.token_ids)) > 8, "a model that always says the same proves nothing"
    assert 0 < cold.ttft_s <= cold.total_s
    assert 0 < cold.ttft_cpu_s <= cold.cpu_s
    assert (cold.finish_reason, cold.error) == ("length", None)


@needs_vllm
def test_counts_of_requests_at_the_same_time(engine: EngineProcess) -> None:
    engine.generate([other(1)])
    longer, fresh, shorter = engine.generate([[*other(1), 5, 6], other(2), other(1)[:500]], max_tokens=4)
    assert (longer.local_tokens, fresh.local_tokens, shorter.local_tokens) == (896, 0, 384)
    assert (longer.computed_tokens, fresh.computed_tokens, shorter.computed_tokens) == (106, 1000, 116)
    assert [len(answer.token_ids) for answer in (longer, fresh, shorter)] == [4, 4, 4]


@needs_vllm
def test_every_block_of_a_prompt_matters(engine: EngineProcess) -> None:
    """Else an answer from wrong KV bytes would look right."""
    prompts = [other(3)]
    for block in range(0, 1000, 128):
        prompts.append(other(3)[:block] + other(4)[block : block + 128] + other(3)[block + 128 :])
    right, *wrong = engine.generate(prompts, cache_salt="alone")
    assert all(answer.token_ids != right.token_ids for answer in wrong)


@needs_vllm
def test_salt(engine: EngineProcess) -> None:
    engine.generate([other(5)], cache_salt="a")
    assert engine.generate([other(5)], cache_salt="b")[0].local_tokens == 0
    assert engine.generate([other(5)], cache_salt="a")[0].local_tokens == 896


@needs_vllm
def test_adapters(engine: EngineProcess, tmp_path: Path) -> None:
    said = [engine.generate([PROMPT])[0].token_ids]
    for number in (1, 2):
        path = write_lora(tmp_path / str(number), TINY, seed=number)
        said.append(engine.generate([PROMPT], lora=(f"adapter{number}", number, str(path)))[0].token_ids)
    assert said[0] != said[1] != said[2] != said[0]


@needs_vllm
def test_a_refused_request_is_an_answer(engine: EngineProcess) -> None:
    [answer] = engine.generate([[5] * 20000])
    assert answer.error is not None
    assert "maximum model length" in answer.error
    assert answer.finish_reason is None
    assert engine.generate([PROMPT])[0].error is None


@needs_vllm
def test_abort(engine: EngineProcess) -> None:
    name = engine.submit(other(6), max_tokens=15000)
    while not engine.state()["requests"].get(name, {}).get("said"):
        assert not engine.poll()
    engine.abort(name)
    [answer] = engine.wait([name])
    assert answer.finish_reason == "abort"
    assert answer.token_ids
    engine.abort(name)  # too late is harmless


@needs_vllm
def test_sleep_ends_requests(engine: EngineProcess) -> None:
    name = engine.submit(other(7), max_tokens=15000)
    engine.sleep()
    assert engine.wait([name])[0].finish_reason == "abort"
    engine.wake_up()
    assert engine.generate([PROMPT])[0].local_tokens == 0, "sleeping forgets"


@needs_vllm
def test_steps_by_hand(engine: EngineProcess) -> None:
    engine.auto_step(False)
    name = engine.submit(other(8), max_tokens=3)
    assert engine.state()["requests"][name]["said"] == 0
    assert engine.step()
    assert engine.state()["requests"][name] == {"status": "RUNNING", "prompt": 1000, "computed": 1000, "said": 1}
    assert not engine.poll()
    assert not engine.step(10)
    assert len(engine.poll()[name].token_ids) == 3
    assert len(engine.wait([name])[0].token_ids) == 3
    assert not engine.poll()


@needs_vllm
def test_reset(engine: EngineProcess) -> None:
    engine.generate([PROMPT])
    assert engine.reset_prefix_cache(reset_connector=True)
    assert engine.generate([PROMPT])[0].local_tokens == 0


@needs_vllm
def test_metrics(engine: EngineProcess) -> None:
    name = "vllm:prompt_tokens_by_source{source=local_compute}"
    before = engine.metrics()
    engine.generate([other(9)])
    after = engine.metrics()
    assert after[name] - before[name] == 1000
    count = "vllm:time_to_first_token_seconds_count"
    assert after[count] - before[count] == 1


@needs_vllm
def test_apply(engine: EngineProcess, models: Path) -> None:
    assert engine.apply(f"{__name__}:hello", a=1) == {"model": str(models / "tiny"), "a": 1}
    with pytest.raises(EngineRaisedError, match=r"^AttributeError: "):
        engine.apply(f"{__name__}:nothing")


@needs_vllm
def test_several_groups(models: Path) -> None:
    with EngineProcess.start(write_model(models / "hybrid", HYBRID)) as engine:
        assert engine.info["groups"] == 3
        cold, hit = engine.generate([PROMPT])[0], engine.generate([PROMPT])[0]
        assert hit.local_tokens == 896
        assert cold.token_ids == hit.token_ids
        # an engine whose step raises is dead, as a server's is
        engine.apply(f"{__name__}:break_scheduler")
        with pytest.raises(EngineDiedError, match="AttributeError"):
            engine.generate([PROMPT])


@needs_vllm
def test_two_engines_share_through_a_connector(models: Path, tmp_path: Path) -> None:
    """Through the example that vLLM has, which stores within the step."""
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    connector["kv_connector_extra_config"] = {"shared_storage_path": str(tmp_path)}  # type: ignore[assignment]
    settings = {"kv_transfer_config": connector}
    model = write_model(models / "tiny", TINY)
    with EngineProcess(model, settings) as one, EngineProcess(model, settings) as two:
        one.wait_ready()
        two.wait_ready()
        [cold], [shared] = one.generate([PROMPT]), two.generate([PROMPT])
    assert (cold.loaded_tokens, shared.loaded_tokens, shared.local_tokens) == (0, 896, 0)
    assert cold.token_ids == shared.token_ids
