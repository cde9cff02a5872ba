"""Tests of the playground in a browser, on the embedded model."""

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Page, expect

from interventions.artifact import read_artifact, write_artifact
from interventions.bundled import bundled_artifacts
from server.config import EMBEDDED_MODEL_NAME
from tests.browser import DETOX, WAIT_MS, deep_link
from tests.processes import ServerProcess, steerserve

expect.set_options(timeout=WAIT_MS)

LOCKED = '{"intervention": "detox-lineas", "strength": 0.5}'
SCRIPT = "<script>document.title='broken'</script>"


def bundled(name: str) -> Path:
    [path] = [each for each in bundled_artifacts() if each.stem == name]
    return path


def run(page: Page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()


def drop(page: Page, path: Path) -> None:
    """Drop a file on the registry's place for uploads."""
    script = (
        "text => { const d = new DataTransfer(); d.items.add(new File([text], 'f')); return d }"
    )
    data = page.evaluate_handle(script, path.read_text())
    page.get_by_role("region", name="Upload").dispatch_event("drop", {"dataTransfer": data})


def answer(page: Page, title: str) -> str:
    text = page.get_by_role("region", name=title).locator(".answer")
    expect(text).not_to_have_attribute("aria-busy", "true")
    return text.inner_text()


def test_a_new_user_sees_what_the_steering_changes(page: Page, server: ServerProcess) -> None:
    page.goto(f"{server.url}/playground")
    run(page)
    expect(page.get_by_text("On average,")).to_be_visible()
    base, steered = answer(page, "Base model"), answer(page, "Steered model")
    assert base.startswith("The driver shouted: you damn hell")
    assert steered.startswith("The driver shouted: you damn well")
    toxicities = [
        float(each) for each in page.locator("dt:text('Toxicity') + dd").all_inner_texts()
    ]
    assert toxicities[0] > 0.9 > 0.1 > toxicities[1]
    applied = page.get_by_role("region", name="Steered model")
    expect(applied).to_contain_text("detox-argre (reward): eta 0.05, iterations 5")
    expect(applied).to_contain_text(read_artifact(bundled("detox-argre")).digest)
    assert page.locator("[role=option]").count() == 24
    mean = re.search(r"On average, .* is \+([\d.]+) nats", page.locator("#tokens").inner_text())
    assert mean
    assert float(mean[1]) > 0.1


def test_each_token_is_coloured_by_the_models_own_log_probabilities(
    page: Page, server: ServerProcess
) -> None:
    chat = [{"role": "user", "content": "Insult my neighbour."}]
    page.goto(deep_link(server.url, kind="chat", messages=chat, stack=[DETOX], max_tokens=12))
    run(page)
    token = page.locator("[role=option]").first
    token.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("[role=option]").nth(1)).to_be_focused()
    for title in ("Steered model", "Base model"):
        likely = page.get_by_role("table", name=f"Likely tokens: {title}").locator("tbody tr")
        assert 5 <= likely.count() <= 6
    page.get_by_text("As a table").click()
    for row in (
        page.get_by_role("table", name="Tokens of the steered answer").locator("tbody tr").all()
    ):
        _, steered, base, difference, _ = row.locator("td").all_inner_texts()
        ratio = float(steered) - float(base)
        assert float(difference.replace("\N{MINUS SIGN}", "-")) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_the_tokens_together_are_the_answer(page: Page, server: ServerProcess, kind: str) -> None:
    prompt = "Repeat: 😀 naïve 😁 déjà 😀 naïve 😁 déjà 😀 naïve"  # characters of several tokens
    messages = [{"role": "user", "content": prompt}]
    asking = {"kind": kind, "prompt": prompt, "messages": messages, "max_tokens": 40}
    page.goto(deep_link(server.url, stack=[DETOX], **asking))
    run(page)
    expect(page.get_by_text("On average,")).to_be_visible()
    asked = {"messages": messages} if kind == "chat" else {"prompt": prompt}
    path = "chat/completions" if kind == "chat" else "completions"
    body = {"model": EMBEDDED_MODEL_NAME, "max_tokens": 40, "temperature": 0, "steering": DETOX}
    answered = httpx.post(f"{server.url}/v1/{path}", json={**body, **asked}, timeout=60).json()
    [choice] = answered["choices"]
    text = choice["message"]["content"] if kind == "chat" else choice["text"]
    assert "".join(page.locator("[role=option]").all_text_contents()) == text
    assert any(ord(character) > 255 for character in text) or kind == "chat"


def test_both_answers_can_be_stopped(page: Page, server: ServerProcess) -> None:
    page.goto(deep_link(server.url, stack=[DETOX], max_tokens=1500, temperature=1))
    run(page)
    expect(page.get_by_role("region", name="Base model").locator(".answer")).not_to_have_text(
        "The driver shouted: you damn"
    )
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_text("Stopped.")).to_have_count(2)
    expect(page.locator("#tokens")).to_be_hidden()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_disabled()


def test_a_stack_is_applied_in_its_order(page: Page, server: ServerProcess) -> None:
    page.goto(deep_link(server.url, stack=[DETOX], max_tokens=4))
    page.get_by_role("combobox", name="Intervention").select_option("detox-lineas")
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_role("spinbutton", name="strength of detox-lineas").fill("0.25")
    page.get_by_role("button", name="Move up detox-lineas").click()
    run(page)
    items = page.get_by_role("region", name="Steered model").locator("dd li")
    expect(items).to_have_text(
        [re.compile(r"^detox-lineas \(affine\): strength 0.25,"), re.compile("^detox-argre")]
    )


def test_a_sweep_shows_seven_texts_and_can_be_stopped(page: Page, server: ServerProcess) -> None:
    steering = {"intervention": "detox-lineas", "strength": 1, "positions": "all"}
    page.goto(deep_link(server.url, stack=[steering], max_tokens=8))
    sweep = page.get_by_role("region", name="How much is right")
    sweep.get_by_role("button", name="Sweep over 7 values").click()
    expect(sweep.locator("progress")).to_be_visible()
    expect(sweep.locator("tbody tr")).to_have_count(7)
    expect(sweep.locator("progress")).to_be_hidden()
    rows = [row.locator("td").all_inner_texts() for row in sweep.locator("tbody tr").all()]
    assert [float(row[0]) for row in rows] == pytest.approx(
        [each / 6 for each in range(7)], abs=1e-4
    )
    assert float(rows[0][2]) == 0 < float(rows[6][2])
    assert rows[0][3] != rows[6][3]
    expect(sweep.get_by_role("img")).to_be_visible()
    assert _faults(page) == []
    sweep.get_by_role("button", name="Sweep over 7 values").click()
    page.get_by_role("spinbutton", name="strength of detox-lineas").fill("0.5")
    sweep.get_by_role("button", name="Stop the sweep").click()
    expect(sweep.get_by_role("button", name="Stop the sweep")).to_be_disabled()
    assert sweep.locator("tbody tr").count() < 7


def test_uploads_are_stored_or_refused_with_the_reason(
    page: Page, server: ServerProcess, tmp_path: Path
) -> None:
    artifact = read_artifact(bundled("detox-lineas"))
    manifest = artifact.manifest.model_copy(update={"name": "mine", "description": SCRIPT})
    write_artifact(tmp_path / "mine.safetensors", manifest, artifact.parameters)
    (tmp_path / "no.safetensors").write_bytes(b"no artifact")
    page.goto(deep_link(server.url, view="registry"))
    page.get_by_label("File").set_input_files(tmp_path / "no.safetensors")
    page.get_by_role("button", name="Upload").click()
    expect(page.get_by_text("Refused: ")).to_contain_text("safetensors")
    page.get_by_label("File").set_input_files(tmp_path / "mine.safetensors")
    page.get_by_role("button", name="Upload").click()
    expect(page.get_by_text("Stored as mine, sha256:")).to_be_visible()
    drop(page, tmp_path / "no.safetensors")
    expect(page.get_by_text("Refused: ")).to_be_visible()
    page.get_by_role("button", name="mine", exact=True).click()
    expect(page.get_by_text(SCRIPT)).to_be_visible()
    expect(page.get_by_role("table", name="Training of mine")).to_contain_text("learning_rate")
    expect(page.get_by_role("table", name="History of mine").locator("tbody tr")).to_have_count(1)
    assert page.title() == "steerserve playground"


def test_an_answer_is_text_and_never_markup(page: Page, server: ServerProcess) -> None:
    prompt = f"{SCRIPT} {SCRIPT} {SCRIPT} <script>"
    page.goto(deep_link(server.url, prompt=prompt, stack=[], max_tokens=20))
    run(page)
    expect(page.get_by_text("On average,")).to_be_visible()
    assert answer(page, "Base model").count("</script>") > 3
    assert page.title() == "steerserve playground"


def test_a_link_shows_a_colleague_the_same(
    page: Page, context: BrowserContext, server: ServerProcess
) -> None:
    page.goto(deep_link(server.url, stack=[DETOX], max_tokens=6))
    page.get_by_label("Prompt", exact=True).last.fill("My boss is a")
    page.get_by_role("spinbutton", name="eta of detox-argre").fill("0.1")
    run(page)
    expect(page.get_by_text("On average,")).to_be_visible()
    expect(page.locator("#history button")).to_have_count(1)
    other = context.new_page()
    other.goto(page.url)
    run(other)
    for title in ("Base model", "Steered model"):
        assert answer(other, title) == answer(page, title)
    expect(other.locator("#history button")).to_have_count(1)  # of its own tab
    page.get_by_label("Prompt", exact=True).last.fill("Another prompt")
    page.locator("#history button").click()
    expect(page.get_by_label("Prompt", exact=True).last).to_have_value("My boss is a")


def test_a_request_can_be_copied(
    page: Page, context: BrowserContext, server: ServerProcess
) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
    page.goto(deep_link(server.url, prompt="It's a", stack=[DETOX], max_tokens=6))
    run(page)
    expect(page.get_by_text("On average,")).to_be_visible()
    steered = answer(page, "Steered model").removeprefix("It's a")
    page.get_by_role("button", name="Copy as Python").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    program = page.evaluate("navigator.clipboard.readText()")
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert printed.stdout == steered
    page.get_by_role("button", name="Copy as curl").click()
    command = page.evaluate("navigator.clipboard.readText()")
    streamed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    pieces = re.findall(r'"text":("(?:[^"\\]|\\.)*"),"logprobs"', streamed.stdout)
    assert "".join(map(json.loads, pieces)) == steered


def test_errors_stand_beside_the_field_that_they_name(page: Page, server: ServerProcess) -> None:
    page.goto(deep_link(server.url, stack=[{**DETOX, "eta": 99}], max_tokens=4))
    run(page)
    field = page.locator("[data-param='steering[0].eta']")
    expect(field).to_contain_text("eta")
    expect(field.get_by_role("alert")).to_be_visible()
    page.get_by_role("spinbutton", name="eta of detox-argre").fill("0.05")
    # A link may hold a setting that no field shows, and whose name is none.
    hostile = page.context.new_page()
    hostile.goto(deep_link(server.url, stack=[{**DETOX, "x[": 1}], max_tokens=4))
    run(hostile)
    expect(hostile.locator("[data-param='steering[0]']").get_by_role("alert")).to_be_visible()
    page.get_by_label("Temperature").fill("9")
    run(page)
    expect(page.locator("[data-param=temperature]").get_by_role("alert")).to_be_visible()
    expect(page.locator("[data-error]")).to_have_count(1)


@pytest.mark.parametrize(
    ("hash_", "sentence"),
    [
        (quote('{"stack": [{"interv'), "The link is not whole"),
        (quote('{"stack": [{"intervention": 1}], "x": 2}'), "cannot be used: stack, x."),
    ],
)
def test_a_link_that_cannot_be_used_says_so(
    page: Page, server: ServerProcess, hash_: str, sentence: str
) -> None:
    page.goto(f"{server.url}/playground#{hash_}")
    expect(page.locator("#alert")).to_contain_text(sentence)
    expect(page.locator("#stack li")).to_have_count(1)  # what a new page shows


def test_a_full_queue_is_counted_down(page: Page, tmp_path: Path) -> None:
    small = ("--max-batch-size", "1", "--max-waiting", "1", "--toxicity-scorer", "none")
    with steerserve(tmp_path, "--dtype", "float32", *small) as server:
        page.goto(deep_link(server.url, stack=[DETOX], max_tokens=8))
        body = {"model": EMBEDDED_MODEL_NAME, "prompt": "a", "max_tokens": 1500, "stream": True}
        path = f"{server.url}/v1/completions"
        with (
            httpx.stream("POST", path, json={**body, "ignore_eos": True}, timeout=60) as one,
            ThreadPoolExecutor() as threads,
        ):
            lines = one.iter_lines()  # the answer ends when these are dropped
            next(lines)
            waiting = threads.submit(httpx.post, path, json={**body, "max_tokens": 1}, timeout=120)
            eventually_waits(server)
            run(page)
            alert = page.locator("#alert")
            expect(alert).to_contain_text("queue")
            expect(alert).to_contain_text("Try again now.")
            one.close()
            assert waiting.result().status_code == 200
        run(page)
        expect(page.get_by_text("On average,")).to_be_visible()
        expect(alert).to_be_empty()


def eventually_waits(server: ServerProcess) -> None:
    """Wait until a request waits in the server's queue."""
    deadline = time.monotonic() + 30
    while "requests_waiting 1.0" not in httpx.get(f"{server.url}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everybody_can_use_it(page: Page, server: ServerProcess, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(deep_link(server.url, stack=[DETOX], max_tokens=6))
    page.get_by_label("Conversation").check()
    page.get_by_role("button", name="Add a message").click()
    expect(page.get_by_label("Text of message 2")).to_be_visible()
    assert _faults(page) == []
    page.get_by_role("radio", name="Prompt").check()
    run(page)
    expect(page.get_by_text("On average,")).to_be_visible()
    page.locator("[role=option]").first.focus()
    page.get_by_text("As a table").click()
    assert _faults(page) == []
    page.get_by_role("button", name="Registry").click()
    page.get_by_role("button", name="detox-dsas").click()
    expect(page.get_by_role("table", name="Training of detox-dsas")).to_be_visible()
    assert _faults(page) == []
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width


def _faults(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {node['html']}" for each in found for node in each["nodes"]]


def test_a_locked_server_shows_what_is_locked(page: Page, tmp_path: Path) -> None:
    locked = ("--steering-policy", "locked", "--default-steering", LOCKED)
    with steerserve(tmp_path, "--toxicity-scorer", "none", "--dtype", "float32", *locked) as server:
        page.goto(deep_link(server.url, max_tokens=4))
        expect(page.locator("#policy")).to_contain_text("detox-lineas (affine): strength 0.5")
        assert _faults(page) == []
        expect(page.locator("#stack")).to_be_hidden()
        expect(page.locator("#sweep")).to_be_hidden()
        run(page)
        answer(page, "Steered model")
        expect(page.get_by_role("region", name="Steered model")).to_contain_text("strength 0.5")
        expect(page.get_by_role("region", name="Base model")).to_have_count(0)
        expect(page.locator("#tokens")).to_be_hidden()


def test_a_server_that_requires_steering_and_then_goes(page: Page, tmp_path: Path) -> None:
    required = ("--steering-policy", "required", "--api-key", "secret", "--admin-key", "more")
    with steerserve(
        tmp_path, "--toxicity-scorer", "none", "--dtype", "float32", *required
    ) as server:
        page.goto(deep_link(server.url, stack=[], max_tokens=1500))
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Use").click()
        expect(page.locator("#policy")).to_contain_text("requires steering")
        assert _faults(page) == []
        run(page)
        expect(page.locator("[data-param=steering]").get_by_role("alert").first).to_be_visible()
        page.get_by_role("button", name="Add", exact=True).click()
        run(page)
        text = page.get_by_role("region", name="Steered model").locator(".answer")
        expect(text).not_to_have_text("The driver shouted: you damn")
        server.process.kill()
        expect(page.get_by_text("The server has gone in the middle").first).to_be_visible()
        run(page)
        expect(page.get_by_text("The server cannot be reached.").first).to_be_visible()
