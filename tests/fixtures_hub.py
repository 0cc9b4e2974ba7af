"""A Hub on 127.0.0.1 that the real `huggingface_hub` client talks to: models, data sets and Spaces, in memory.

It knows what this project needs of https://huggingface.co/docs/hub/api: repositories (private, gated),
branches, commits and pull requests, files within commits or through LFS, downloads with ranges and the redirect of LFS
files to another host, and the errors. Xet is not spoken: clients are told `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import close_session, constants
from transformers.utils import hub as transformers_hub

TOKEN = "hf_loopback"
LFS = (".safetensors", ".png", ".onnx", ".parquet", ".npz")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self):
        """Git's name for what Git holds: the content, or a pointer to it."""
        held = self.content
        if self.lfs:
            version = "version https://git-lfs.github.com/spec/v1"
            held = f"{version}\noid sha256:{self.sha256}\nsize {len(held)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    def entry(self, path):
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}} if self.lfs else {}
        return {"type": "file", "path": path, "oid": self.oid, "size": len(self.content), **lfs}


@dataclass
class Repository:
    name: str
    kind: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None
    refs: dict = field(default_factory=dict)  # branch -> commit
    commits: dict = field(default_factory=dict)  # commit -> {path: File}
    titles: dict = field(default_factory=dict)  # commit -> title
    variables: dict = field(default_factory=dict)  # of a Space

    def commit(self, branch, files, title):
        commit = hashlib.sha1(f"{self.kind}/{self.name} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits[commit], self.titles[commit], self.refs[branch] = dict(files), title, commit
        return commit

    def files(self, revision="main"):
        return self.commits[self.refs.get(revision, revision)]

    def info(self, commit):
        files = self.commits[commit]
        front = (
            re.match(r"---\n(.*?)\n---", files["README.md"].content.decode(), re.S) if "README.md" in files else None
        )
        card = yaml.safe_load(front[1]) if front else {}
        return {
            "_id": "0",
            "id": self.name,
            "modelId": self.name,
            "author": self.name.split("/")[0],
            "sha": commit,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "sdk": self.sdk,
            "cardData": card,
            "tags": card.get("tags", []),
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "siblings": [{"rfilename": path, "size": len(files[path].content)} for path in sorted(files)],
        }


class Refused(Exception):
    def __init__(self, status, message, code=""):
        self.status, self.message, self.code = status, message, code


class LoopbackHub:
    """Serves from a thread until `close()`; `repositories` is `{(kind, "user/name"): Repository}`."""

    def __init__(self, user="someone"):
        self.user, self.repositories, self.blobs, self.requests = user, {}, {}, []
        self.read_only = self.broken = self.lossy = False
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def model(self, name):
        return self.repositories["model", name]

    def environment(self, home, *, token=TOKEN):
        """Of a process that knows this Hub and nothing else, with an empty cache."""
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return own | ({} if token is None else {"HF_TOKEN": token})


@contextmanager
def client_of(hub, home):
    """This process takes `hub` for the real one; nobody is logged in, the cache is in `home`."""
    with pytest.MonkeyPatch.context() as patch:
        settings = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
        }
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        patch.setattr(transformers_hub, "_hf_api", None, raising=False)  # it would remember the first address
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1,localhost")
        close_session()  # the next one reads the settings above
        yield
    close_session()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args):
        pass

    def route(self):
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.body = self._body() if self.command in ("POST", "PUT", "DELETE") else b""
        self.hub.requests.append(f"{self.command} {address.path}")
        try:
            with self.hub.lock:
                for verbs, pattern, answer in _ROUTES:
                    if self.command in verbs.split() and (match := re.fullmatch(pattern, address.path)):
                        return answer(self, *[group and unquote(group) for group in match.groups()])
                raise Refused(404, f"this Hub has no {self.command} {address.path}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.send(refused.status, {"error": refused.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = route

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status, data=None, headers=None, *, raw=None):
        content = raw if raw is not None else b"" if data is None else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "X-Request-Id": "loopback",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who asks, and for what.

    def known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def writer(self):
        if not self.known():
            raise Refused(401, "Invalid username or password.")
        if self.hub.read_only:
            raise Refused(403, "This token has no write permission.")

    def repository(self, kind, name):
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and not self.known()):
            raise Refused(404 if self.known() else 401, "Repository not found", "RepoNotFound")
        return found

    def at(self, kind, name, revision):
        repository = self.repository(kind, name)
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit

    # What is answered.

    def whoami(self):
        if not self.known():
            raise Refused(401, "Invalid user token.")
        access = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        self.send(200, {"type": "user", "id": "1", "name": self.hub.user, "orgs": [], "auth": access})

    def validate_yaml(self):
        self.send(200, {"errors": [], "warnings": []})

    def create(self):
        self.writer()
        wish = json.loads(self.body)
        kind, name = wish.get("type") or "model", f"{wish.get('organization') or self.hub.user}/{wish['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repositories:
            return self.send(409, {"error": "You already created this repo", "url": url})
        private = wish.get("visibility") == "private" or bool(wish.get("private"))
        made = self.hub.repositories[kind, name] = Repository(name, kind, private=private, sdk=wish.get("sdk"))
        made.commit("main", {}, "initial commit")
        self.send(200, {"url": url, "id": name, "name": name})

    def branch(self, kind, name, branch):
        self.writer()
        repository = self.repository(kind, name)
        if branch in repository.refs:
            raise Refused(409, "Reference already exists")
        repository.refs[branch] = repository.refs["main"]
        self.send(200, {})

    def variable(self, kind, name):
        self.writer()
        wish = json.loads(self.body)
        self.repository(kind, name).variables[wish["key"]] = wish["value"]
        self.send(200, {wish["key"]: {"key": wish["key"], "value": wish["value"], "updatedAt": DATE}})

    def preupload(self, kind, name, revision):
        self.writer()
        _, commit = self.at(kind, name, revision)
        rows = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] and file["path"].endswith(LFS) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send(200, {"files": rows, "commitOid": commit})

    def lfs_batch(self, prefix, name):
        self.writer()
        wish = json.loads(self.body)
        objects = []
        for item in wish["objects"]:
            address = {"href": f"{self.hub.url}/lfs/{item['oid']}"}
            verify = {"href": f"{address['href']}/verify"}
            actions = {} if item["oid"] in self.hub.blobs else {"actions": {"upload": address, "verify": verify}}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        media = {"Content-Type": "application/vnd.git-lfs+json"}
        self.send(200, {"transfer": "basic", "objects": objects}, media)

    def lfs_put(self, oid):
        if self.hub.lossy or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(422, "sha256 mismatch")
        self.hub.blobs[oid] = self.body
        self.send(200)

    def lfs_verify(self, oid):
        self.send(200 if len(self.hub.blobs.get(oid, b"")) == json.loads(self.body)["size"] else 404, {})

    def commit(self, kind, name, revision):
        self.writer()
        if self.hub.broken:
            raise Refused(507, "The disks of this Hub are full.")
        repository, parent = self.at(kind, name, revision)
        files, title = dict(repository.commits[parent]), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, f"LFS object {value['oid']} is missing")
                files[value["path"]] = File(self.hub.blobs[value["oid"]], lfs=True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, f"this Hub knows no {line['key']}")
        url, request = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}", {}
        if self.query.get("create_pr"):
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.refs)
            revision, request = f"refs/pr/{number}", {"pullRequestUrl": f"{url}/discussions/{number}"}
        commit = repository.commit(revision, files, title)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{url}/commit/{commit}", "hookOutput": ""}
        self.send(200, answer | request)

    def info(self, kind, name, revision=None):
        repository, commit = self.at(kind, name, revision or "main")
        self.send(200, repository.info(commit))

    def refs(self, kind, name):
        repository = self.repository(kind, name)
        rows = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in repository.refs.items()
        ]
        self.send(200, {"branches": rows, "tags": [], "converts": []})

    def tree(self, kind, name, revision, folder=None):
        repository, commit = self.at(kind, name, revision)
        start = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path, file in sorted(repository.commits[commit].items()):
            if path.startswith(start):
                parents = path[len(start) :].split("/")[:-1]
                if recursive or not parents:
                    entries.append(file.entry(path))
                folders |= {
                    start + "/".join(parents[: i + 1]) for i in range(len(parents) if recursive else 1) if parents
                }
        if folder and not entries and not folders:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        self.send(
            200,
            [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)] + entries,
        )

    def paths_info(self, kind, name, revision):
        repository, commit = self.at(kind, name, revision)
        is_json = self.body[:1] == b"{"
        wanted = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        files = repository.commits[commit]
        self.send(200, [files[path].entry(path) for path in wanted if path in files])

    def resolve(self, prefix, name, revision, path):
        kind = {"datasets/": "dataset", "spaces/": "space"}.get(prefix, "model")
        repository, commit = self.at(kind, name, revision)
        if repository.gated and not self.known():
            raise Refused(401, "Access to this model is restricted.", "GatedRepo")
        if path not in repository.commits[commit]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        file = repository.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.sha256 if file.lfs else file.oid}"'}
        if not file.lfs:
            return self.serve(file.content, headers)
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(file.content))}
        # The real one sends clients elsewhere, too; to the same host they would follow and lose these headers.
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
        self.hub.blobs[file.sha256] = file.content
        self.send(302, None, headers | {"Location": f"{elsewhere}/lfs/{file.sha256}"})

    def lfs_get(self, oid):
        self.serve(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def serve(self, content, headers):
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or self.command == "HEAD":
            return self.send(200, None, headers, raw=content)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if first > last:
            return self.send(416, None, headers | {"Content-Range": f"bytes */{len(content)}"})
        part = content[first : last + 1]
        self.send(206, None, headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}, raw=part)


_REPO = r"/api/(model|dataset|space)s/([^/]+/[^/]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", _REPO + r"/variables", _Handler.variable),
    ("POST", _REPO + r"/preupload/(.+)", _Handler.preupload),
    ("POST", r"/(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", _Handler.lfs_put),
    ("POST", r"/lfs/(\w+)/verify", _Handler.lfs_verify),
    ("GET HEAD", r"/lfs/(\w+)", _Handler.lfs_get),
    ("POST", _REPO + r"/commit/(.+)", _Handler.commit),
    ("POST", _REPO + r"/branch/(.+)", _Handler.branch),
    ("POST", _REPO + r"/paths-info/([^/]+)", _Handler.paths_info),
    ("GET", _REPO + r"/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    ("GET", _REPO + r"/refs", _Handler.refs),
    ("GET", _REPO + r"(?:/revision/([^/]+))?", _Handler.info),
    ("GET HEAD", r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
]
