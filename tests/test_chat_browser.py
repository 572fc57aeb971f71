"""The page of `rlhf chat` in headless Chromium: a dialogue, columns, hostile texts, the keyboard, no foreign requests.

It needs Debian's chromium and chromium-driver; without them these tests are skipped.
"""

import contextlib
import json
import threading
import time

import pytest
import tiny

from pipeline import stage
from pipeline.chat import command, selection
from pipeline.chat import page as page_server
from pipeline.chat.session import Settings
from pipeline.config.load import load
from pipeline.show.screen import open_console

pytest.importorskip("selenium")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

# What the stage `hostile` has learnt to answer.
HOSTILE = "<img src=x onerror=window.broken=1>"
ASKED = "</textarea><script>window.broken = true</script> & tea?"
STAGES = {
    "sft": tiny.SFT,
    "reward": tiny.REWARD | {"init": "sft"},
    "hostile": {
        "type": "sft",
        "data": "hostile",
        "init": "base",
        "lora": None,
        "training": {"max_steps": 150, "learning_rate": 1e-2},
    },
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.write_rows(folder / "hostile.jsonl", [row | {"completion": HOSTILE} for row in tiny.demonstrations()])
    data = {name: {"path": f"{name}.jsonl"} for name in ("comparisons", "demonstrations", "hostile")}
    config = load(tiny.make_run(folder, STAGES, data=data))
    for name in config.stages:
        stage.run(config, name)
    return config.run_path


@pytest.fixture(scope="module")
def address(run_dir):
    """The page's address. The server is in this process; `test_chat.py` serves the page by the command."""
    run = selection.open_run(run_dir)
    talk = command._opened(run, ["sft", "hostile"], "reward", False, open_console())
    said = []
    serving = (talk, Settings(0.0, 40, 0), 0, said.append)
    threading.Thread(target=page_server.show, args=serving, daemon=True).start()
    while not said:
        time.sleep(0.01)
    return next(word for word in said[0].split() if word.startswith("http://127.0.0.1:"))


@pytest.fixture
def page(browser, address):
    """The page with no dialogue, with the stages sft and hostile."""
    browser.get(address)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#stages li"))
    reset = "call('state', {}).then(({version}) => call('reset', {version}))"
    choose = "({version}) => call('choose', {version, stages: ['sft', 'hostile']})"
    browser.execute_async_script(f"{reset}.then({choose}).then(arguments[0])")
    browser.refresh()
    until(browser, lambda: stages(browser) == ["sft", "hostile"])
    return browser


def until(browser, condition):
    WebDriverWait(browser, 60).until(lambda _: condition())


def status(browser):
    return browser.find_element(By.ID, "status").text


def stages(browser):
    """In one step: the list is made anew when stages change."""
    return browser.execute_script("return [...document.querySelectorAll('#stages li')].map((li) => li.firstChild.data)")


def ask(browser, question):
    """Type a question, send it by the Enter key, and wait for the answers: those of the last turn, by stage."""
    before = len(browser.find_elements(By.CSS_SELECTOR, ".turn"))
    browser.find_element(By.ID, "question").send_keys(question, Keys.ENTER)
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, ".turn")) == before + 1)
    until(browser, lambda: status(browser) == "All have answered")
    return answers(browser)


def answers(browser):
    (*_, turn) = browser.find_elements(By.CSS_SELECTOR, ".turn")
    cards = turn.find_elements(By.CSS_SELECTOR, ".answer")
    text = "return arguments[0].querySelector('.text').textContent"
    return {card.get_attribute("aria-label"): browser.execute_script(text, card) for card in cards}


def test_a_dialogue_of_two_turns_with_hostile_texts(page):
    """The policy was trained to answer with HTML; what it says is shown as text, and so is the question."""
    first = ask(page, "Tell me about tea.")
    assert list(first) == ["sft", "hostile"] and first["hostile"] == HOSTILE
    second = ask(page, ASKED)
    assert page.execute_script("return document.querySelectorAll('.question')[1].textContent") == ASKED
    assert page.execute_script("return window.broken === undefined && document.querySelector('img') === null")
    figures = [node.text for node in page.find_elements(By.CSS_SELECTOR, ".figures")]
    assert len(figures) == 4 and all("score" in text and "KL" in text and "token" in text for text in figures)
    page.refresh()
    until(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".turn")) == 2)
    assert answers(page) == second  # the dialogue is not in the page


def test_columns_are_added_and_removed(page):
    ask(page, "Tell me about tea.")
    page.find_element(By.CSS_SELECTOR, "[aria-label='Remove hostile']").click()
    until(page, lambda: stages(page) == ["sft"])
    page.find_element(By.CSS_SELECTOR, "#more option").click()
    page.find_element(By.ID, "add").click()
    until(page, lambda: stages(page) == ["sft", "base"])
    assert list(ask(page, "And rain?")) == ["sft", "base"]
    assert len(page.find_elements(By.CSS_SELECTOR, ".turn")) == 2


def test_a_mistake_is_one_message_and_loses_nothing(page):
    ask(page, "Tell me about tea.")
    page.find_element(By.ID, "question").send_keys("tea " * 200, Keys.ENTER)
    until(page, lambda: "positions" in page.find_element(By.ID, "fault").text)
    assert len(page.find_elements(By.CSS_SELECTOR, ".turn")) == 1
    field = page.find_element(By.ID, "question")
    assert field.get_attribute("value").startswith("tea tea")
    field.clear()
    ask(page, "And rain?")
    assert page.find_element(By.ID, "fault").text == ""
    page.find_element(By.ID, "reset").click()
    until(page, lambda: not page.find_elements(By.CSS_SELECTOR, ".turn"))


def test_an_answer_is_stopped_and_taken_back(page):
    """The field gets the question back, and the next one is the first of the dialogue."""
    first = ask(page, "Tell me about tea.")
    page.find_element(By.ID, "reset").click()
    until(page, lambda: not page.find_elements(By.CSS_SELECTOR, ".turn"))
    # In one step: by hand a stop comes while text does, and a tiny model is done before a driver's next command.
    page.execute_script("question.value = 'Tell me about rain.'; form.requestSubmit(); find('stop').click()")
    until(page, lambda: status(page).startswith("Stopped"))
    assert "not part of the dialogue" in page.find_element(By.CSS_SELECTOR, ".turn").text
    field = page.find_element(By.ID, "question")
    assert field.get_attribute("value") == "Tell me about rain."
    field.clear()
    assert ask(page, "Tell me about tea.") == first


@pytest.fixture
def other(page, address):
    """`with other():` is a second window of the same dialogue, which is closed at the end of the block."""

    @contextlib.contextmanager
    def opened():
        first = page.current_window_handle
        page.switch_to.new_window("tab")
        page.get(address)
        until(page, lambda: page.find_elements(By.CSS_SELECTOR, "#stages li"))
        yield
        page.close()
        page.switch_to.window(first)

    return opened


def test_two_windows_never_answer_within_each_others_dialogue(page, other):
    """The older window is shown what has changed, keeps its question, and goes on from there."""
    with other():
        theirs = ask(page, "Tell me about tea.")
        page.find_element(By.CSS_SELECTOR, "[aria-label='Remove hostile']").click()
        until(page, lambda: stages(page) == ["sft"])
    assert stages(page) == ["sft", "hostile"] and not page.find_elements(By.CSS_SELECTOR, ".turn")
    page.find_element(By.ID, "question").send_keys("And rain?", Keys.ENTER)
    until(page, lambda: "has changed in another window" in page.find_element(By.ID, "fault").text)
    assert stages(page) == ["sft"] and answers(page) == theirs
    assert len(page.find_elements(By.CSS_SELECTOR, ".turn")) == 1
    field = page.find_element(By.ID, "question")
    assert field.get_attribute("value") == "And rain?"
    field.clear()
    assert list(ask(page, "And rain?")) == ["sft"]


def test_a_stopped_question_is_not_filled_with_another_windows_answers(page, other):
    with other():
        theirs = ask(page, "Tell me about tea.")
    page.execute_script("question.value = 'And rain?'; form.requestSubmit(); find('stop').click()")
    until(page, lambda: status(page).startswith("Stopped"))
    questions = "return [...document.querySelectorAll('.turn:not(.taken-back) .question')].map((q) => q.textContent)"
    assert page.execute_script(questions) == ["Tell me about tea."]
    assert not set(answers(page).values()) & set(theirs.values())  # of the question that was taken back
    page.find_element(By.ID, "question").clear()
    ask(page, "And rain?")
    assert page.execute_script(questions) == ["Tell me about tea.", "And rain?"]


def test_everything_has_a_name_and_the_keyboard_reaches_it(page):
    nodes = page.find_elements(By.CSS_SELECTOR, "button, input, select, textarea, summary, [role=region]")
    assert len(nodes) == 13
    assert [node.get_attribute("outerHTML") for node in nodes if not node.accessible_name.strip()] == []
    page.find_element(By.ID, "question").send_keys("Hello")
    names = []
    for _ in range(5):
        page.switch_to.active_element.send_keys(Keys.TAB)
        names.append(page.switch_to.active_element.get_attribute("id"))
    assert names == ["send", "reset", "temperature", "max_new_tokens", "seed"]
    assert page.find_element(By.ID, "status").get_attribute("role") == "status"


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_never_wider_than_the_window(page, width):
    ask(page, "Tell me about tea.")
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    too_wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.execute_script("return window.innerWidth") == width and page.execute_script(too_wide) <= 0
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_request_leaves_the_page_and_nothing_is_refused(page, address):
    """Last of all: the browser has logged what all tests of this file did."""
    entries = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in entries if one["method"] == "Network.requestWillBeSent"]
    assert any(url == f"{address}ask" for url in urls)
    assert [url for url in urls if not url.startswith((address, "data:"))] == []
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
