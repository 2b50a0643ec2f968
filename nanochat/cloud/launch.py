"""Rent, reach, run, watch, fetch, terminate: the sequence that no paid instance escapes.

The record is on disk before the request leaves. From then on whatever happens (Ctrl-C, an error, a lost connection, a timeout) ends in `end`,
which repeats and verifies by the cloud's own list, or says loudly which command terminates what is left.
"""
import os
import time
from dataclasses import dataclass

from nanochat.cloud import session
from nanochat.cloud.api import NoAnswer, Refused
from nanochat.cloud.ledger import Record, read_records
from nanochat.cloud.market import affordable, dollars
from nanochat.cloud.session import Failed
from nanochat.cloud.signals import Interrupted, Signals, say
from nanochat.cloud.ssh import ConnectionLost, HostKeyChanged, Machine, NotAllowed, RemoteError

LEFT_BEHIND = 3           # exit status when an instance may still be billing
UNKNOWN_SECONDS = 180     # so long may the API not know an instance that it has just rented out
NEVER_LISTED_SECONDS = 3600  # after that an id that was never in the list is taken for dead
LOOKS = 6                 # that often at least is the list read before "it is not there" is believed
REFUSING_SECONDS = 240    # so long may a booting machine refuse our key


@dataclass
class Job:
    """One rental and all that acts on it."""
    cloud: object
    config: object
    signals: Signals
    record: Record
    machine: Machine | None = None  # once it has let us in
    missing: int = 0          # times in a row that the cloud's list did not have it


def launch(job, offer, cargo):
    """Rent `offer`, send `cargo` there, watch the run to its end, fetch what it made, terminate -> exit status."""
    config = job.config

    def work():
        rent(job, offer)
        if config.skip_wait:
            return leave(job, "it was not waited for (--skip-wait)")
        reach(job)
        if not config.no_deploy:
            session.deploy(job, cargo)
        if config.auto_start:
            session.start(job, cargo)
        else:
            say(f"the machine is ready, and stays while this runs: {session.by_hand(job)}")
        if not config.detach:
            return session.watch(job, look)
        if config.auto_start:
            session.watch(job, look, until_started=True)
        return leave(job, "it was started with --detach")

    return supervise(job, work)


def supervise(job, work):
    """Do `work` -> its exit status. However it ends, the instance ends too, unless work returns None: then it is left on purpose."""
    try:
        status = work()
        if status is None:
            return 0
    except Interrupted as interrupt:
        status = 128 + interrupt.number
        say(f"interrupted by {interrupt}")
    except (Refused, NoAnswer, ConnectionLost, HostKeyChanged, RemoteError, Failed, ValueError, OSError) as error:
        status = 1
        say(f"FAILED: {error}")
    except BaseException:  # a bug: first the money, then the traceback
        finish(job)
        raise
    return status if finish(job) else LEFT_BEHIND


def finish(job):
    """Fetch what can be had, then terminate -> True when nothing is left. Never raises."""
    job.signals.tolerate(0)  # one more Ctrl-C skips the fetching
    if job.machine is not None:
        try:
            if job.signals.received:
                say("fetching the artifacts first; Ctrl-C again to do without them")
            session.fetch(job)
        except Interrupted:
            say("the artifacts are not waited for")
        except Exception as error:  # whatever it is, it must not keep the instance alive
            say(f"not all artifacts were fetched: {type(error).__name__}: {error}")
    return end(job)


# -- rent -------------------------------------------------------------------------------------------------------------

def find_offer(job, skip=(), until=None):
    """The best offer that is free, not in `skip` and not too dear; waits for capacity until `until`, `capacity_minutes` by default."""
    config, cloud = job.config, job.cloud
    until = until or job.signals.deadline(60 * config.capacity_minutes)
    told = False
    while True:
        matching = cloud.wanted(cloud.offers())
        free = [offer for offer in affordable(matching, config.max_price) if place(offer) not in skip]
        if free:
            return free[0]
        if time.monotonic() >= until:
            raise Failed(f"no capacity for what was asked for ({len(matching)} matching offers, none free): see --list, name --fallback-regions, "
                         f"or wait with --capacity-minutes (now {config.capacity_minutes:g})")
        if not told:
            say(f"no capacity at the moment; asking again every {config.poll_seconds:g} s")
        told, skip = True, ()
        job.signals.sleep(config.poll_seconds)


def place(offer):
    return offer.kind, offer.region, offer.request.get("node_name")


def rent(job, offer):
    """Rent the offer, or the next one where capacity is gone meanwhile. The record holds the id when this returns."""
    cloud, record, skip, unanswered = job.cloud, job.record, set(), 0
    until = job.signals.deadline(60 * job.config.capacity_minutes)
    while True:
        before = [instance.id for instance in cloud.instances() if not cloud.resembles(instance, record)] if not record.doubt else record.known_before
        record.save(state="requesting", kind=offer.kind, region=offer.region, node=offer.request.get("node_name", ""), gpus=offer.gpus,
                    cents_per_hour=offer.cents_per_hour, requested_at=time.time(), known_before=before)
        say(f"renting {offer} as {record.name}")
        try:
            id = cloud.rent(offer, record.name)
        except Refused as refusal:
            record.save(state="unknown" if record.doubt else "refused", note=str(refusal))
            if not cloud.lacks_capacity(refusal):
                raise
            say(f"{offer.region or offer.kind}: {refusal}")
            skip.add(place(offer))
            offer = find_offer(job, skip, until)
            continue
        except NoAnswer as problem:
            unanswered += 1
            record.save(doubt=True, note=str(problem))
            say(f"the request got no answer ({problem}): looking whether it was carried out")
            id = find_rented(job)
            if not id and cloud.rentals_have_names and unanswered < 3:
                say("it was not; asking again under the same name")
                continue
            if not id:
                record.save(state="unknown")
                raise
        record.save(state="rented", id=id, rented_at=time.time())
        say(f"rented: {id or 'without an id so far'}")
        return


def find_rented(job):
    """Look in the cloud's list for an instance of ours until it is certain enough that there is none -> its id or ""."""
    until, looks = job.signals.deadline(job.config.settle_seconds), 0
    while looks < LOOKS or time.monotonic() < until:
        mine, looks = ours(job, job.cloud.instances()), looks + 1
        if mine:
            for extra in mine[1:]:
                job.cloud.terminate(extra.id)
            return mine[0].id
        job.signals.sleep(min(5, job.config.settle_seconds / 5))
    return ""


def ours(job, listed):
    """The listed instances that are this rental, that with the recorded id first. Where a cloud knows no names, only a single lookalike counts."""
    record, cloud = job.record, job.cloud
    exact = [instance for instance in listed if record.id and instance.id == record.id]
    record.seen = record.seen or bool(exact)
    others = {other.id for other in read_records(cloud.name) if other.name != record.name}
    alike = [instance for instance in listed if not instance.is_over and instance.id != record.id and instance.id not in others and cloud.resembles(instance, record)]
    if cloud.rentals_have_names:
        return exact + alike
    if exact or record.seen or not alike:
        return exact
    if len(alike) > 1:
        raise Failed(f"{len(alike)} rentals look like this one, and none of them was touched: terminate yours among {', '.join(instance.id for instance in alike)}")
    return alike


# -- reach ------------------------------------------------------------------------------------------------------------

def look(job):
    """The instance as the cloud sees it now, None where it cannot be asked or does not know it. Failed where it cannot be used any more."""
    record = job.record
    try:
        mine = ours(job, job.cloud.instances())
        for extra in mine[1:]:
            say(f"a second instance of this name, {extra.id}, is terminated")
            job.cloud.terminate(extra.id)
    except NoAnswer as problem:
        say(f"the API does not answer: {problem}")
        return None
    job.missing = 0 if mine else job.missing + 1
    if not mine:
        if record.seen and job.missing >= 3:
            raise Failed(f"instance {record.id} is no longer in {job.cloud.name}'s list")
        return None
    instance = mine[0]
    if instance.id != record.id:
        record.save(id=instance.id)
    if instance.state == "broken" or instance.is_over:
        raise Failed(f"instance {instance.id} is {instance.status}")
    return instance


def reach(job):
    """Wait until the instance runs and lets us in by ssh: job.machine."""
    config, record, signals = job.config, job.record, job.signals
    until, known_by = signals.deadline(60 * config.max_wait_minutes), signals.deadline(UNKNOWN_SECONDS)
    allowed_by, told, machine, problem = None, "", None, "the instance is not running yet"
    say(f"waiting until it runs, at most {config.max_wait_minutes:g} minutes")
    while True:
        instance = look(job)
        if instance is None:
            if time.monotonic() > known_by and machine is None:
                raise Failed(f"the API does not know instance {record.id} {UNKNOWN_SECONDS} s after renting it")
        else:
            if instance.status != told:
                told = instance.status
                say(f"instance {instance.id}: {told}")
            if instance.state == "running" and instance.host:
                record.save(host=instance.host, port=instance.port, user=instance.user)
                machine = machine_of(job)
        if machine is not None:
            try:
                machine.run("true", timeout=30)
                say(f"ssh lets us in: {machine.user}@{machine.host} port {machine.port}, its host key is pinned")
                job.machine = machine
                return
            except NotAllowed as error:
                allowed_by, problem = allowed_by or signals.deadline(REFUSING_SECONDS), f"{error}: is --ssh-key the private part of the key that the account names?"
            except ConnectionLost as error:
                allowed_by, problem = None, str(error)
        if time.monotonic() > until or allowed_by and time.monotonic() > allowed_by:
            raise Failed(f"the machine could not be reached in time: {problem}")
        signals.sleep(config.poll_seconds if machine is None else min(5, config.poll_seconds))


def machine_of(job):
    record = job.record
    return Machine(record.host, record.port, record.user, record.ssh_key, record.folder / "known_hosts", job.signals)


# -- end --------------------------------------------------------------------------------------------------------------

def end(job):
    """Terminate all that is ours until the cloud's list shows nothing of it -> True; else the loud lines and False. Never raises.

    A 404 or an empty list proves nothing while the rental is younger than `settle_seconds`: new instances are unknown for a moment. An id that
    the cloud gave out and never listed proves nothing for much longer.
    """
    cloud, config, record, signals = job.cloud, job.config, job.record, job.signals
    if not record.is_open:
        return True
    signals.tolerate(2)
    until, problem, confirmed, seen = signals.deadline(60 * config.terminate_minutes), "", set(), {record.id} - {""}
    looks = 0
    say(f"terminating {record.id or record.name}; three more Ctrl-C would give that up")
    quietly(record.save, state="ending")
    settle = (time.time() if record.doubt and not record.id else record.requested_at) + config.settle_seconds * signals.scale
    try:
        while time.monotonic() < until:
            try:
                listed, looks = ours(job, cloud.instances()), looks + 1
                alive, over = ({instance.id for instance in listed if instance.is_over is ended} for ended in (False, True))
                seen |= alive | over
                for id in sorted(alive | seen - confirmed - over):
                    if cloud.terminate(id):
                        confirmed.add(id)
                certain = seen and seen <= confirmed | over and not record.doubt
                enough = settle if record.seen or not record.id else record.requested_at + NEVER_LISTED_SECONDS
                if not alive and (certain or looks >= LOOKS and time.time() >= enough):
                    quietly(record.save, state="terminated", ended_at=time.time())
                    say(f"terminated, verified in {cloud.name}'s list: {', '.join(sorted(seen)) or 'nothing was rented'}; it cost about {dollars(record.cost)}")
                    return True
                problem = f"still {', '.join(sorted(alive)) or 'possibly to appear'} in the list"
            except (Refused, NoAnswer) as error:
                problem = str(error)
                say(f"not yet terminated: {problem}")
                if isinstance(error, Refused) and error.status in (401, 403):
                    break  # the key is refused: repeating does not mend that
            signals.sleep(min(5, max(0.5, config.settle_seconds / 10)))
    except Interrupted:
        problem = "you stopped the terminating"
    except Exception as error:  # a bug here must not hide the command below
        problem = f"{type(error).__name__}: {error}"
    quietly(record.save, state="rented" if record.id else "unknown", note=problem)
    warn(job, problem)
    return False


def warn(job, problem):
    record, cloud = job.record, job.cloud
    bar = "!" * 100
    for line in (bar, f"INSTANCE {record.id or record.name} ({record.kind} {record.region}, {dollars(record.cents_per_hour)} an hour) MAY STILL BE RUNNING AND BILLING: {problem}",
                 f"terminate it:   {command(job, '--terminate', record.id or record.name)}", f"and make sure:  {command(job, '--status')}   or look at {cloud.console}", bar):
        say(line)


def leave(job, why):
    """The instance stays, as the user asked: say what it costs and how it ends -> None."""
    record = job.record
    record.save(state="detached", pid=0)
    say(f"INSTANCE {record.id} GOES ON at {dollars(record.cents_per_hour)} an hour: {why}. Nobody watches its deadline or idleness now.")
    for words, flag in (("watch it, fetch and terminate at the end", "--watch"), ("its terminal", "--attach"), ("terminate it now", "--terminate")):
        say(f"    {words + ':':<42} {command(job, flag, record.name)}")


def command(job, *words):
    url = ["--api-url", job.config.api_url] if job.config.api_url else []
    return " ".join(["python -m", job.cloud.module, *words, *url])


def quietly(act, **arguments):
    """Write to disk if that works: a full disk must not keep an instance alive."""
    try:
        act(**arguments)
    except OSError as error:
        say(f"the ledger cannot be written: {error}")


def adopt(record):
    """This process watches the rental from now on."""
    record.save(pid=os.getpid(), state="rented")
