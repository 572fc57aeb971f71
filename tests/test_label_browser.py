"""`rlhf label` in headless Chromium: answers by keyboard, and a server that is killed while somebody answers.

It needs Debian's chromium and chromium-driver; without them these tests are skipped.
"""

import json
import random
import threading
import time

import label_runs
import pytest

from pipeline.label.answers import Answers
from pipeline.label.labels import Labels
from pipeline.label.pairs import Completion, Pair

pytest.importorskip("selenium")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

KEYS = {"left": Keys.ARROW_LEFT, "right": Keys.ARROW_RIGHT, "tie": "t", "skip": "s"}
HOSTILE = '<script>window.broken = true</script><img src="http://127.0.0.1:1/x" onerror="window.broken = true">'


@pytest.fixture
def begun(tmp_path):
    """A run folder and labels of it: 20 questions on 18 pairs, the first of them hostile, none answered."""
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is salt?"},
        {"role": "assistant", "content": "A mineral."},
        {"role": "user", "content": HOSTILE},
    ]
    both = (Completion("a", HOSTILE, 9, True, 1.0), Completion("b", "two\n\nlines", 9, True, 0.0))
    return label_runs.write(tmp_path, [Pair(turns, both), *label_runs.made(17)], 2 / 18)


def state(driver) -> tuple[str, str]:
    """The question on the page, and the number of answers that the page knows of; waits until keys count."""
    body = driver.find_element(By.TAG_NAME, "body")
    WebDriverWait(driver, 10, 0.02).until(lambda _: body.get_attribute("data-ready") == "yes")
    return body.get_attribute("data-number"), body.get_attribute("data-answered")


def press(driver, key: str) -> None:
    driver.find_element(By.TAG_NAME, "body").send_keys(key)


def fault(driver) -> str:
    return driver.find_element(By.ID, "fault").text


def open_page(driver, port: int, secret: str) -> None:
    driver.get(f"http://127.0.0.1:{port}{secret}")
    state(driver)


def test_a_person_answers_and_the_server_is_killed_meanwhile(browser, begun, tmp_path):
    """Each question is asked until its answer is on disk, and then never again; what was shown as kept is kept."""
    seed = time.time_ns()  # when a server is killed, which no seed decides alone
    print(f"seed {seed}")  # shown where the test fails
    drawn = random.Random(seed)
    run_dir, place = begun
    pressed: dict[str, str] = {}
    kept: dict[str, str] = {}
    kills = 0
    while len(kept) < 20:
        process, port, secret = label_runs.start(run_dir, tmp_path, "--to", place)
        open_page(browser, port, secret)
        number, answered = state(browser)
        on_disk = {str(one.question): one.opinion for one in Answers(place / "answers.jsonl").standing}
        assert kept.items() <= on_disk.items() <= pressed.items(), "nothing is lost, nothing is made up"
        assert int(answered) == len(on_disk) and number not in on_disk
        kept = on_disk
        if kills < 3:
            threading.Timer(drawn.uniform(0.2, 2.5), process.kill).start()
        while number != "end":
            pressed[number] = drawn.choice(list(KEYS))
            press(browser, KEYS[pressed[number]])
            body = browser.find_element(By.TAG_NAME, "body")
            before = number
            WebDriverWait(browser, 10, 0.02).until(
                lambda _, body=body, before=before: fault(browser) or body.get_attribute("data-number") != before
            )
            if fault(browser):
                assert "No answer is lost: give the same command again" in fault(browser)
                break
            kept[number] = pressed[number]
            number, _ = state(browser)
        process.kill()
        process.wait()
        kills += 1
    assert kills >= 3
    lines = (place / "answers.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    assert sorted(entry["question"] for entry in entries) == sorted(map(int, pressed))
    assert {str(entry["question"]): entry["opinion"] for entry in entries} == pressed
    assert all(0 <= entry["seconds"] < 30 for entry in entries)
    labels = Labels(place, label_runs.about(place))
    assert labels.next is None
    labels.write()
    rows = label_runs.rows_of(place)
    assert len(rows) == label_runs.about(place)["comparisons"]["rows"] == labels.figures()["comparisons"]


@pytest.fixture
def place(begun):
    return begun[1]


@pytest.fixture
def page(browser, begun, tmp_path):
    """The page of these labels; its driver."""
    run_dir, place = begun
    process, port, secret = label_runs.start(run_dir, tmp_path, "--to", place)
    open_page(browser, port, secret)
    yield browser
    process.kill()
    process.wait()


def texts(driver, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(node => node.textContent)"
    return driver.execute_script(script, selector)


def test_what_the_page_shows(page):
    assert texts(page, "#prompt .who") == ["System", "User", "Assistant", "User"]
    assert texts(page, "#prompt .text") == ["Be brief.", "What is salt?", "A mineral.", HOSTILE]
    assert {*texts(page, "#left"), *texts(page, "#right")} == {HOSTILE, "two\n\nlines"}
    assert page.execute_script("return window.broken === undefined && document.querySelector('main img') === null")
    assert page.find_element(By.ID, "count").text == "Question 1 of 20"
    assert page.find_element(By.ID, "right").size["height"] > 60  # its lines stay lines
    nodes = page.find_elements(By.CSS_SELECTOR, "button, section[aria-labelledby], nav, progress")
    assert len(nodes) == 10
    assert [node.get_attribute("outerHTML")[:80] for node in nodes if not node.accessible_name.strip()] == []
    keys = [button.text for button in page.find_elements(By.CSS_SELECTOR, "nav button")]
    assert keys == ["← Left is better", "T Equally good", "Right is better →", "S Skip", "U Undo"]


def test_undo_and_what_is_no_answer(page, place):
    """Undo is on disk too. Keys with Ctrl, other keys, and a second press at once answer nothing."""
    first, _ = state(page)
    press(page, Keys.ARROW_LEFT)
    press(page, Keys.ARROW_LEFT)  # at once: nobody has read the next question
    second, answered = state(page)
    assert (answered, second != first) == ("1", True)
    for key in ("x", Keys.ARROW_DOWN, Keys.CONTROL + "s", "1"):
        press(page, key)
        press(page, Keys.NULL)
    assert state(page) == (second, "1")
    press(page, "U")
    assert state(page) == (first, "0")
    assert Answers(place / "answers.jsonl").standing == [] and label_runs.rows_of(place) == []
    press(page, "u")
    assert state(page) == (first, "0")
    page.find_element(By.CSS_SELECTOR, "[data-answer=tie]").send_keys(Keys.ENTER)  # a button, by the keyboard
    assert state(page) == (second, "1")
    (answer,) = Answers(place / "answers.jsonl").standing
    assert answer.opinion == "tie" and answer.seconds > 0.2


def test_the_end_of_the_page(page, place):
    number, _ = state(page)
    while number != "end":
        press(page, Keys.ARROW_LEFT)
        number, _ = state(page)
    rows = texts(page, "#end tbody tr")
    assert len(rows) == 5 and rows[1].startswith("left side chosen1.00 [0.84, 1.00]20 answers for a side")
    assert not page.find_element(By.ID, "question").is_displayed()
    assert [b.text for b in page.find_elements(By.CSS_SELECTOR, "nav button") if b.is_displayed()] == ["U Undo"]
    press(page, "u")
    assert state(page)[1] == "19" and page.find_element(By.ID, "question").is_displayed()


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_never_wider_than_the_window(page, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.execute_script("return window.innerWidth") == width
    too_wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.execute_script(too_wide) <= 0
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_request_leaves_this_machine_and_nothing_is_refused(page):
    """Last of all: the browser has logged what all tests of this file did."""
    entries = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    requests = [one["params"]["request"]["url"] for one in entries if one["method"] == "Network.requestWillBeSent"]
    assert requests
    assert [url for url in requests if not url.startswith(("http://127.0.0.1:", "data:"))] == []
    severe = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    of_kills = ("ERR_CONNECTION", "ERR_SOCKET", "ERR_EMPTY_RESPONSE", "favicon")
    assert [message for message in severe if not any(part in message for part in of_kills)] == []
