#!/bin/sh
# Debian's Chromium for the tests of the app, where there is none and this user may install it. Never fails: without a
# browser those tests skip, and say why.
command -v chromium >/dev/null 2>&1 && exit 0
if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" -ne 0 ]; then
    echo "no chromium, and no apt-get as root to install it: the tests of the app in a browser will skip" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >/dev/null 2>&1
apt-get install -qq -y --no-install-recommends chromium >/dev/null 2>&1 ||
    echo "apt-get could not install chromium: the tests of the app in a browser will skip" >&2
exit 0
