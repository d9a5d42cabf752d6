#!/bin/sh
# Installs Debian's Chromium for the tests of the web page, as root or through a sudo that asks for no password.
# It never fails: without a browser those tests are skipped, and pytest reports them as skipped.
LIMIT=${LIMIT:-600} # seconds for each of the two apt-get commands, so that a machine without a network does not wait forever

without() {
    echo "no Chromium ($1): the tests of the web page will be skipped. Install it with: apt-get install chromium" >&2
    exit 0
}

command -v chromium >/dev/null && exit 0
command -v apt-get >/dev/null || without "no apt-get here"
as=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null && sudo -n true 2>/dev/null || without "not root, and sudo asks for a password"
    as="sudo -n"
fi
echo "installing Chromium for the tests of the web page" >&2
apt() { $as env DEBIAN_FRONTEND=noninteractive timeout "$LIMIT" apt-get -qq -o DPkg::Lock::Timeout=60 "$@" >/dev/null; }
apt update || without "apt-get update failed"
# Chromium only recommends a font, but without one a page shows no text.
apt install -y --no-install-recommends chromium fonts-dejavu-core || without "apt-get install failed"
command -v chromium >/dev/null || without "its package brought no program called chromium"
