#!/usr/bin/env bash
# An emulated aarch64 board: Debian under qemu, with a real sshd and aarch64's own Python and ONNX Runtime. Bundles must answer there as they
# do here; nothing is timed for a table. Wants root, Debian or Ubuntu, network, 1.5 GB of disk; the root file system is kept.
#
#   scripts/board_emulated.sh PYTHON          BOARD_ROOT=~/.cache/anytime/board-arm64  DEBIAN_MIRROR=...  ANYTIME_DATA=...
set -euo pipefail
python=${1:?which Python of this machine has anytime}
root=${BOARD_ROOT:-$HOME/.cache/anytime/board-arm64}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "board-emulated wants root: for debootstrap, mounts and sshd" >&2; exit 2; }

if ! { command -v debootstrap && command -v qemu-aarch64-static && command -v update-binfmts; } >/dev/null; then
  apt-get update -q
  apt-get install -y -q --no-install-recommends qemu-user-static binfmt-support debootstrap
fi
mountpoint -q /proc/sys/fs/binfmt_misc || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
update-binfmts --enable qemu-aarch64

if [ ! -e "$root/.debian" ]; then # about 15 minutes, emulated
  packages=python3,python3-pip,python3-venv,openssh-server,ca-certificates,iproute2,procps
  debootstrap --arch=arm64 --variant=minbase --include=$packages bookworm "$root" "$mirror"
  chroot "$root" useradd -m -s /bin/sh nvidia
  chroot "$root" usermod -p '*' nvidia # a locked account is let in nowhere
  touch "$root/.debian"
fi

# Without an aarch64 cpuinfo ONNX Runtime dies of SIGSEGV when it is imported: the host's leaks through.
for processor in 0 1; do
  cat <<CPU
processor	: $processor
BogoMIPS	: 62.50
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x0
CPU part	: 0xd42
CPU revision	: 1

CPU
done >"$root/cpuinfo"

inside() { # (inside COMMAND...): in the board, with namespaces of its own, which end with it
  exec unshare --mount --pid --fork --kill-child --propagation private bash -c '
    root=$1; shift
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    mount --bind "$root/cpuinfo" "$root/proc/cpuinfo"
    mount -t tmpfs tmpfs "$root/run"
    mkdir -p "$root/run/sshd"
    exec chroot "$root" "$@"' _ "$root" "$@"
}

if [ ! -e "$root/.engines" ]; then
  cp /etc/resolv.conf "$root/etc/resolv.conf"
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
  (inside sh -c 'python3 -m venv /opt/v && PIP_CERT=/etc/ssl/certs/ca-certificates.crt /opt/v/bin/pip install -q onnxruntime numpy')
  touch "$root/.engines"
fi

work=$(mktemp -d)
trap '[ -z "${daemon:-}" ] || kill -KILL "$daemon" 2>/dev/null || true; rm -rf "$work"' EXIT
mkdir -m 700 "$work/.ssh"
ssh-keygen -q -t ed25519 -N '' -f "$work/.ssh/user"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cp "$work/.ssh/user.pub" "$root/etc/ssh/board.pub"
cat >"$root/etc/ssh/board" <<CONFIG
Port $port
ListenAddress 127.0.0.1
HostKey /etc/ssh/ssh_host_ed25519_key
PidFile none
AuthorizedKeysFile /etc/ssh/board.pub
UsePAM no
StrictModes no
AllowUsers nvidia
Subsystem sftp internal-sftp
SetEnv QEMU_CPU=cortex-a76
CONFIG
(inside /usr/sbin/sshd -D -e -f /etc/ssh/board) 2>"$work/log" &
daemon=$!
for _ in $(seq 100); do
  ! grep -q 'Server listening' "$work/log" || break
  sleep 0.2
done
grep -q 'Server listening' "$work/log" || { cat "$work/log" >&2; exit 1; }

cat >"$work/.ssh/config" <<CONFIG
Host emulated
  HostName 127.0.0.1
  Port $port
  User nvidia
  IdentityFile $work/.ssh/user
  UserKnownHostsFile $work/.ssh/known_hosts
CONFIG
echo "[127.0.0.1]:$port $(cat "$root/etc/ssh/ssh_host_ed25519_key.pub")" >"$work/.ssh/known_hosts"
unset SSH_AUTH_SOCK
HOME=$work "$python" scripts/board_emulated.py
