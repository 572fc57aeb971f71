"""The report in headless Chromium: search and order of completions, hostile texts, no requests, names for the keyboard.

It needs Debian's chromium and chromium-driver; without them these tests are skipped.
"""

import json

import pytest
import report_runs
from rich.console import Console

from pipeline.html import page

pytest.importorskip("selenium")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

HOSTILE = '<script>window.broken = true</script><img src="http://127.0.0.1:1/x" onerror="window.broken = true">'
HOSTILE += "</textarea></script><!-- \u202eright to left\u202c \u2067\u2028 ]]> {{ 7 * 7 }}"
LONG = "long " * 20_000  # 100 kB
NUM_PROMPTS = 300


def rows():
    """Prompt n: ppo's score falls with n, its KL rises; judge and reward model disagree on every tenth."""
    result = []
    for number in range(NUM_PROMPTS):
        texts = {policy: f"Answer {number} of {policy}." for policy in report_runs.POLICIES}
        if number == 7:
            texts["ppo"] = HOSTILE
        if number == 8:
            texts["dpo"] = LONG
        judge = 0.2 if number % 10 == 0 else 0.9
        ppo = {
            "score": 5 - number / 100,
            "judge": judge,
            "kl": number / 10,
            "length": number % 13,
            "ended": number != 3,
        }
        result.append(report_runs.sample(f"What is thing {number}?", texts, ppo=ppo))
    return result


@pytest.fixture(scope="module")
def report(browser, tmp_path_factory):
    """The page of a run with 300 prompts and four policies, opened."""
    folder = report_runs.write(tmp_path_factory.mktemp("runs") / "tiny")
    report_runs.write_samples(folder, rows())
    page.make([folder], None, Console(quiet=True))
    path = folder / "report.html"
    assert path.stat().st_size < 5_000_000
    browser.get(path.as_uri())
    return path


@pytest.fixture
def opened(browser, report):
    browser.refresh()
    return browser


def headings(driver):
    return [node.text for node in driver.find_elements(By.CSS_SELECTOR, ".rows .prompt")]


def choose(driver, name, value):
    driver.find_element(By.CSS_SELECTOR, f"select[name={name}] option[value={value}]").click()


def status(driver):
    return driver.find_element(By.CSS_SELECTOR, ".status").text


def test_completions_are_searched(opened):
    search = opened.find_element(By.NAME, "search")
    assert status(opened) == "300 of 300 prompts, 20 shown"
    search.send_keys("THING 25")
    assert status(opened) == "13 of 300 prompts, 13 shown"  # 25, 125, 225 and 250 to 259
    search.send_keys(" answer 125 dpo")
    assert headings(opened) == ["Prompt 126"]
    search.clear()
    search.send_keys("nowhere")
    assert headings(opened) == [] and status(opened) == "0 of 300 prompts, 0 shown"


def test_completions_are_sorted(opened):
    assert headings(opened)[:3] == ["Prompt 1", "Prompt 2", "Prompt 3"]
    choose(opened, "key", "score")
    choose(opened, "direction", "up")
    assert headings(opened)[:2] == ["Prompt 300", "Prompt 299"]
    choose(opened, "key", "kl")
    choose(opened, "direction", "down")
    assert headings(opened)[:2] == ["Prompt 300", "Prompt 299"]
    choose(opened, "key", "margin")
    assert headings(opened)[:2] == ["Prompt 1", "Prompt 2"]
    choose(opened, "key", "length")
    assert headings(opened)[:2] == ["Prompt 13", "Prompt 26"]
    opened.find_element(By.CSS_SELECTOR, "select[name=policy]").send_keys("sft")
    assert headings(opened)[:2] == ["Prompt 1", "Prompt 2"]  # all of its answers have one length


def test_completions_are_filtered_by_opinions(opened):
    choose(opened, "filter", "disagree")
    assert status(opened) == "30 of 300 prompts, 20 shown" and headings(opened)[:2] == ["Prompt 1", "Prompt 11"]
    choose(opened, "filter", "cut")
    assert headings(opened) == ["Prompt 4"]
    figures = opened.find_elements(By.CSS_SELECTOR, ".rows .answer")[2].text
    assert "score 4.97" in " ".join(figures.split()) and "ended no" in " ".join(figures.split())


def test_more_are_shown_by_the_keyboard(opened):
    """The focus goes to the first of the new ones."""
    opened.find_element(By.NAME, "search").send_keys("thing")  # leaving the field must not take them away again
    more = opened.find_element(By.CSS_SELECTOR, ".more")
    more.send_keys(Keys.ENTER)
    assert len(headings(opened)) == 40 and opened.switch_to.active_element.text == "Prompt 21"


def test_the_keyboard_reaches_all_controls(opened):
    """In the order of the page, from the search on."""
    opened.find_element(By.NAME, "search").click()
    names = []
    for _ in range(5):
        names.append(opened.switch_to.active_element.get_attribute("name"))
        opened.switch_to.active_element.send_keys(Keys.TAB)
    assert names == ["search", "key", "policy", "direction", "filter"]


def test_hostile_texts_stay_texts(opened):
    opened.find_element(By.NAME, "search").send_keys("onerror")
    assert headings(opened) == ["Prompt 8"]
    shown = opened.execute_script("return document.querySelectorAll('.rows .answer .text')[2].textContent")
    assert shown == HOSTILE
    assert opened.execute_script("return window.broken === undefined && document.querySelector('.rows img') === null")
    direction = "return getComputedStyle(document.querySelectorAll('.rows .answer .text')[2]).unicodeBidi"
    assert opened.execute_script(direction) == "isolate"
    opened.find_element(By.NAME, "search").clear()
    opened.find_element(By.NAME, "search").send_keys("long")
    node = opened.find_elements(By.CSS_SELECTOR, ".rows .answer .text")[3]
    assert opened.execute_script("return arguments[0].textContent.length", node) == len(LONG)
    assert node.size["height"] < 400 and node.get_attribute("tabIndex") == "0"


def test_every_control_and_picture_has_a_name(opened):
    for summary in opened.find_elements(By.CSS_SELECTOR, "details:not([open]) > summary"):
        opened.execute_script("arguments[0].parentNode.open = true", summary)
    nodes = opened.find_elements(
        By.CSS_SELECTOR, "input, select, button, svg[role=img], img, [role=region], nav, summary"
    )
    assert len(nodes) > 20
    assert [node.get_attribute("outerHTML")[:80] for node in nodes if not node.accessible_name.strip()] == []
    tables = opened.find_elements(By.TAG_NAME, "table")
    assert len(tables) > 10
    for table in tables:
        assert table.find_elements(By.CSS_SELECTOR, "caption") and table.find_elements(By.CSS_SELECTOR, "th[scope=col]")
        assert table.find_elements(By.CSS_SELECTOR, "th[scope=row]")


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_never_wider_than_the_window(opened, width):
    """Wide tables scroll by themselves."""
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert opened.execute_script("return window.innerWidth") == width
    too_wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert opened.execute_script(too_wide) <= 0
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_request_leaves_the_page_and_nothing_is_refused(opened, report):
    """Last of all: the browser has logged what all tests of this file did."""
    entries = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    requests = [one["params"]["request"]["url"] for one in entries if one["method"] == "Network.requestWillBeSent"]
    assert requests
    assert {url for url in requests if not url.startswith("data:")} <= {report.as_uri()}
    assert [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"] == []
