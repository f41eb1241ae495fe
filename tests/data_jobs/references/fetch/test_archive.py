from __future__ import annotations

import pytest

from data_jobs.references.fetch.archive import Archive, flatten
from data_jobs.references.fetch.errors import FetchError, Refused, Transient
from data_jobs.references.fetch.http import Http


def ids(pages):
    return [record["isic_id"] for page in pages for record in page.records]


@pytest.fixture
def filled(archive_server, new_image):
    archive_server.add(*(new_image(number) for number in range(25)))
    archive_server.page = 10
    return archive_server


def test_every_page_is_read_although_next_names_another_host(filled, archive):
    pages = list(archive.pages(None))
    assert ids(pages) == list(filled.images)
    assert [bool(page.cursor) for page in pages] == [True, True, False]
    assert [page.total for page in pages] == [25, None, None]
    assert filled.paths("query=image_type%3Adermoscopic")[0].startswith("/api/v2/images/search/")


def test_listing_goes_on_from_a_cursor(filled, archive):
    first = next(iter(archive.pages(None)))
    assert ids(archive.pages(first.cursor)) == list(filled.images)[10:]


def test_a_query_narrows_the_search(filled, pace, new_image):
    filled.add(new_image(99, image_type="clinical: close-up"))
    with Http(filled.api, pace) as http:
        asked = "image_type:dermoscopic AND sex:female"
        found = list(Archive(http, base=filled.api, query=asked, collections="65,97").pages(None))
    assert 0 < len(ids(found)) < 25
    assert "collections=65%2C97" in filled.paths()[0]


def test_a_query_that_does_not_parse_is_refused_at_once(filled, pace):
    with Http(filled.api, pace) as http, pytest.raises(Refused, match="answered 400"):
        list(Archive(http, base=filled.api, query='sex:"').pages(None))
    assert len(filled.seen) == 1


@pytest.mark.parametrize("kind", ["reset", "cut", "page"])
def test_a_page_that_breaks_is_asked_for_again(filled, archive, new_fault, kind):
    filled.fail("/search/", new_fault(body=kind), new_fault(status=503))
    assert ids(archive.pages(None)) == list(filled.images)
    assert len(filled.seen) == 5


def test_an_archive_that_stays_down_ends_the_listing(filled, archive, new_fault):
    filled.always["/search/"] = new_fault(status=502)
    with pytest.raises(Transient, match=r"127\.0\.0\.1/api/v2/images/search/ answered 502"):
        list(archive.pages(None))
    assert len(filled.seen) == 8


def test_an_answer_that_is_no_page_is_named(filled, pace, monkeypatch):
    monkeypatch.setattr(filled, "search", lambda *_: (200, {"items": []}))
    with Http(filled.api, pace) as http, pytest.raises(FetchError, match="no page of images"):
        list(Archive(http, base=filled.api).pages(None))


def test_a_search_that_runs_in_a_circle_is_noticed(filled, pace, monkeypatch):
    page = {"results": [], "next": "https://x/?cursor=a", "count": 1}
    monkeypatch.setattr(filled, "search", lambda *_: (200, page))
    with Http(filled.api, pace) as http, pytest.raises(FetchError, match="follows itself"):
        list(Archive(http, base=filled.api).pages(None))


def test_an_image_comes_from_the_url_that_the_archive_names_now(filled, archive):
    with archive.open("ISIC_0000003") as body:
        assert b"".join(body.chunks) == filled.files["ISIC_0000003"]
    assert body.length == len(filled.files["ISIC_0000003"])


@pytest.mark.parametrize(
    ("change", "cause"),
    [({"public": False}, "not public"), ({"public": None}, "not public")],
)
def test_an_image_withdrawn_since_the_listing_is_refused(filled, archive, change, cause):
    filled.images["ISIC_0000003"] |= change
    with pytest.raises(Refused) as refused, archive.open("ISIC_0000003"):
        pass
    assert refused.value.cause == cause


def test_an_image_that_is_gone_is_refused(archive):
    with pytest.raises(Refused) as refused, archive.open("ISIC_7777777"):
        pass
    assert refused.value.cause == "gone"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/x.jpg", None, 7, "https://[bad/"])
def test_a_file_is_only_fetched_from_where_the_archive_itself_could_be(filled, archive, url, monkeypatch):
    answer = {**filled.images["ISIC_0000003"], "files": {"full": {"url": url, "size": 3}}}
    monkeypatch.setattr(filled, "image", lambda _: answer)
    with pytest.raises(Refused), archive.open("ISIC_0000003"):
        pass


@pytest.mark.parametrize(
    "image", [{}, {"metadata": None, "files": 3}, {"metadata": {"clinical": []}, "files": {}}]
)
def test_what_an_image_lacks_is_not_there(image):
    assert set(flatten(image)) == {"isic_id", "copyright_license", "attribution", "public"}


def test_an_image_is_flattened_as_in_the_archives_csv(filled):
    record = flatten(filled.image("ISIC_0000004"))
    assert record["diagnosis_4"] == "Nevus, Spitz"
    assert record["image_type"] == "dermoscopic"
    assert record["bytes"] == len(filled.files["ISIC_0000004"])
