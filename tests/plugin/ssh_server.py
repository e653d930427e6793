"""A real SSH server for one client on this machine, in a process of its own: run with a directory for its keys.

It prints its port and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import asyncssh


async def _run(process: asyncssh.SSHServerProcess[bytes]) -> None:
    """Run a command as sshd does: by a shell, at home, with hardly any environment."""
    child = await asyncio.create_subprocess_shell(
        process.command or "",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=HOME,
        env={"HOME": str(HOME), "PATH": "/usr/bin:/bin"},
    )
    await process.redirect(stdin=child.stdin, stdout=child.stdout, stderr=child.stderr)
    process.exit(await child.wait())


async def _serve() -> None:
    keys = {name: asyncssh.generate_private_key("ssh-ed25519") for name in ("host", "client")}
    for name, key in keys.items():
        key.write_private_key(str(HOME / name))
        (HOME / name).chmod(0o600)  # ssh takes no other
    server = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_host_keys=[keys["host"]],
        authorized_client_keys=asyncssh.import_authorized_keys(keys["client"].export_public_key().decode()),
        process_factory=_run,
        encoding=None,
    )
    (HOME / "known_hosts").write_text(f"far {keys['host'].export_public_key().decode()}")
    (HOME / "ssh_config").write_text(
        f"Host far\n HostName 127.0.0.1\n Port {server.get_port()}\n User tester\n IdentityFile {HOME}/client\n"
        f" IdentitiesOnly yes\n HostKeyAlias far\n UserKnownHostsFile {HOME}/known_hosts\n BatchMode yes\n"
    )
    sys.stdout.write(f"{server.get_port()}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    HOME = Path(sys.argv[1])
    asyncio.run(_serve())
