"""Members that are started one by one: where they meet, what they agree on, who is who after a new start."""

import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from child_process import free_port
from torch.distributed import DistError, HashStore

from memserve import load_config
from memserve.cluster.agreement import check_agreed
from memserve.cluster.farewell import Guest
from memserve.cluster.launch import Place, RunOver, check_words, find_place, is_first
from memserve.cluster.mailbox import Mailbox, births_of
from memserve.cluster.manager import ClusterManager
from memserve.cluster.node_messages import Alive, Gone, Leave, Process, Retire, Start
from memserve.cluster.roster import Roster
from memserve.cluster.turnover import Turnover
from memserve.cluster.watch import Watch
from memserve.cluster.wiring import build_global_scheduler
from memserve.config.errors import ConfigError
from memserve.request import Role
from memserve.sched.load_scaling import ByLoad
from memserve.sched.scaling import Add, Drain, NoScaling, Scaling, Standing
from memserve.transfer.shared_memory import host_id

DISTRIBUTED = ["exec=distributed", "tokens=hash", "cluster=1p1d", "mode=pd_basic", "transport=gloo"]
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


def member(name, store="127.0.0.1:29999", *words):
    return load_config([*DISTRIBUTED, *words, f"cluster.store={store}", f"cluster.member={name}"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.store=h:1"], "cluster.store=h:1 and cluster.member=None: expected both, or neither"),
        (["cluster.member=0"], "cluster.store=None and cluster.member=0: expected both, or neither"),
        (["cluster.store=h", "cluster.member=0"], "cluster.store='h': expected HOST:PORT"),
        (["cluster.store=h:0", "cluster.member=0"], "cluster.store='h:0': expected HOST:PORT"),
        (["cluster.store=:9", "cluster.member=0"], "cluster.store=':9': expected HOST:PORT"),
        (["cluster.store=h:65536", "cluster.member=0"], "cluster.store='h:65536': expected HOST:PORT"),
        (["cluster.store=h:1", "cluster.member=2"], "cluster.member='2': expected scheduler, or .* from 0 to 1"),
        (["cluster.store=h:1", "cluster.member=-1"], "cluster.member='-1': expected scheduler"),
        (["cluster.store=h:1", "cluster.member=decode-1"], "cluster.member='decode-1': expected scheduler"),
    ],
)
def test_who_is_started_alone_is_told_who_it_is_and_where_the_others_meet(words, said):
    with pytest.raises(ConfigError, match=said):
        load_config([*DISTRIBUTED, *words])


def test_a_cluster_of_one_process_has_no_members_to_start():
    with pytest.raises(ConfigError, match="cluster.store=h:1 contradicts exec=simulated: expected exec=distributed"):
        load_config(["exec=simulated", "cluster.store=h:1", "cluster.member=0"])


def test_rank_0_is_the_scheduler_or_torchrun_s_first():
    assert is_first([], {}) and is_first(["cluster.member=scheduler"], {}) and is_first([], {"RANK": "0"})
    assert not is_first(["cluster.member=0"], {"RANK": "0"}) and not is_first([], {"RANK": "1"})
    assert is_first(["cluster.member=1", "cluster.member=scheduler"], {}), "the last word counts"


@pytest.mark.parametrize("flag", ["-m", "--multirun", "--cfg"])
def test_a_flag_is_refused_where_each_of_several_processes_reads_the_words(flag):
    check_words([flag, "exec=distributed", "cluster.member=scheduler"], {})
    for words, environment in (([flag], {"RANK": "0", "WORLD_SIZE": "3"}), (["cluster.member=0", flag], {})):
        with pytest.raises(ConfigError, match=f"{flag} under torchrun .*: expected words with = alone; a sweep is"):
            check_words(words, environment)


@pytest.mark.parametrize("flag", ["-cp=/mine", "--config-name", "-cn"])
def test_another_main_file_is_refused_where_a_sweep_s_points_would_not_read_it(flag):
    check_words([flag, "seed=1"], {})
    with pytest.raises(ConfigError, match=f"{flag} in a sweep, .*: expected --config-dir DIR"):
        check_words([flag, "-m"], {})


@pytest.mark.parametrize(
    "word",
    [
        "fetch=null",
        "policy@decode_policy=null",
        "workload/arrivals=Null",
        "+experiment=null",
        "index=3",
        "model=True",
        "cost_model=-.5",
        "eviction=lru,1e3",
    ],
)
def test_a_group_without_a_word_or_with_a_number_is_refused_by_name(word):
    with pytest.raises(ConfigError, match=f"{re.escape(word)}: expected a word of its group"):
        check_words(["index=none", word], {})
    check_words(["kvcache.num_hbm_blocks=null", "sched.chunk_size=3", "=null", "x" * 300 + "=null", "cluster=1p1d"], {})


@pytest.mark.parametrize(("option", "flags"), [("hydra.run.dir", []), ("hydra.sweep.dir", ["-m"])])
def test_a_directory_that_cannot_be_made_is_refused_by_name_where_it_is_wanted(tmp_path, option, flags):
    (tmp_path / "file").touch()
    word = f"{option}='{tmp_path}/file/new'"
    with pytest.raises(ConfigError, match=f"expected a directory, or where one can be made; {tmp_path}/file is none"):
        check_words([word, *flags], {})
    check_words([word, "cluster.member=0"], {})
    check_words([word, *([] if flags else ["-m"])], {})
    check_words([f"{option}={tmp_path}/file/${{seed}}", *flags], {})
    check_words([f"{option}={tmp_path}/new/er", *flags], {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "Hydra makes it"


@pytest.mark.parametrize(("flags", "option"), [([], "hydra.run.dir"), (["-m"], "hydra.sweep.dir")])
def test_where_the_default_directory_cannot_be_made_it_is_named_too(tmp_path, monkeypatch, flags, option):
    monkeypatch.chdir(tmp_path)
    check_words(flags, {})
    (tmp_path / "outputs").touch()
    with pytest.raises(ConfigError, match=f"{option}=outputs: expected a directory, or where one can be made"):
        check_words(flags, {})
    check_words([*flags, f"{option}={tmp_path}"], {})


def test_members_have_the_ranks_that_their_place_in_the_cluster_says():
    roster = Roster([1, 2], num_spares=2)
    assert [list(roster.ranks_of_member(number)) for number in range(4)] == [[1], [2, 3], [4], [5]]
    roster.release(1)
    assert roster.instance(2) is roster.instance(3) is None
    roster.assign(7, 2)
    assert list(roster.ranks(7)) == [2, 3] and roster.instance(3) == 7, "who belonged together does again"
    roster.release(1)
    assert roster.instance(2) == 7, "what it was before is over"


def test_a_member_of_several_ranks_needs_a_torchrun_that_starts_as_many(monkeypatch):
    words = ["tokens=model", "model=tiny", "cluster.tensor_parallel.decode=2"]
    with pytest.raises(ConfigError, match=r"1 ranks for cluster.member=1: expected 2 \(torchrun --nproc-per-node 2\)"):
        find_place(member(1, "127.0.0.1:29999", *words))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 ranks for cluster.member=0: expected 1"):
        find_place(member(0, "127.0.0.1:29999", *words))


def test_a_scheduler_that_does_not_reach_its_own_store_says_so_soon(monkeypatch):
    monkeypatch.setattr("memserve.cluster.launch._SOON", timedelta(seconds=1))
    elsewhere = f"192.0.2.1:{free_port()}"  # of documentation alone (RFC 5737)
    with pytest.raises(ConfigError, match=f"cluster.store={elsewhere}: no store there"):
        find_place(member("scheduler", elsewhere))


def test_a_member_is_told_of_a_port_that_takes_connections_and_answers_none(monkeypatch):
    monkeypatch.setattr("memserve.cluster.launch.PATIENCE", timedelta(seconds=1))
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cluster.store={address}: no store there: somebody takes connections"):
            find_place(member(0, address))


def test_who_leaves_after_rank_0_has_gone_leaves_all_the_same(monkeypatch, caplog):
    class Gone(HashStore):
        def set(self, key, value):
            raise DistError("Broken pipe")

    monkeypatch.setattr("memserve.cluster.lifeline.own_connection", lambda store: store)
    guest = Guest(Place(1, 2, Gone(), "127.0.0.1"))
    guest.say()
    assert "rank 0 is gone: Broken pipe" in caplog.text


def test_the_scheduler_has_the_store_and_each_process_that_is_a_rank_is_counted(monkeypatch):
    monkeypatch.setattr("memserve.cluster.launch.this_process", lambda: Process(host_id(), 2**22 + 1, ""))
    store = f"127.0.0.1:{free_port()}"
    first = find_place(member("scheduler", store))
    assert (first.rank, first.world_size, first.birth) == (0, 3, 0)
    places = [find_place(member(name, store)) for name in (1, 0, 1)]
    assert [(place.rank, place.birth) for place in places] == [(2, 0), (1, 0), (2, 1)]
    with pytest.raises(ConfigError, match=f"cluster.store={store}: no store there"):
        find_place(member("scheduler", store))
    monkeypatch.undo()
    assert find_place(member(1, store)).birth == 2
    with pytest.raises(ConfigError, match=f"cluster.member=1: process {os.getpid()} is that: expected one that has e"):
        find_place(member(1, store))
    assert find_place(member(0, store)).birth == 1, "nobody was counted"


def test_who_is_started_again_and_finds_nobody_need_not_be_started_again(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr("memserve.cluster.launch._SOON", timedelta(seconds=1))
    with pytest.raises(RunOver, match="nobody is at cluster.store=127.0.0.1"):
        find_place(member(0, f"127.0.0.1:{free_port()}"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["scaling=by_load", "scaling.max_instances=4", "cluster.spares=1"], "scaling.max_instances=4 contradicts"),
        (["policy=prompt_tree", "index=none"], "policy=PromptTree contradicts index=none"),
        (["workload=synthetic", "workload.rate=-1"], "rate=-1.*: expected"),
    ],
)
def test_words_that_contradict_each_other_are_refused_by_a_member_that_finds_nobody_too(words, named, capfd):
    run = Path(__file__).parents[2] / "scripts" / "run.py"
    started = [*DISTRIBUTED, *words, f"cluster.store=127.0.0.1:{free_port()}", "cluster.member=0"]
    assert subprocess.run([sys.executable, run, *started], timeout=60, check=False).returncode == 1
    assert re.search(named, capfd.readouterr().err)


def test_members_that_were_given_other_words_are_refused_by_the_options_names():
    store = HashStore()
    check_agreed(load_config([*DISTRIBUTED, "workload.rate=3"]), store, 0)
    check_agreed(load_config([*DISTRIBUTED, "workload.rate=3", "model.num_threads=1"]), store, 1)
    with pytest.raises(ConfigError, match=r"rank 2: workload.rate=2 \(the scheduler has 3\): expected the sched"):
        check_agreed(load_config([*DISTRIBUTED, "workload.rate=2"]), store, 2)
    with pytest.raises(ConfigError, match=r"index\._target_='memserve.kvcache.index.NullIndex' \(the scheduler has"):
        check_agreed(load_config([*DISTRIBUTED, "workload.rate=3", "index=none"]), store, 1)


def test_what_an_earlier_process_of_a_rank_has_said_is_dropped_once_a_later_one_is_heard():
    store = HashStore()
    boxes = [Mailbox(0, store, "127.0.0.1"), Mailbox(1, store, "127.0.0.1")]
    try:
        assert boxes[0].reaches(1) and not boxes[0].reaches(2)
        boxes[0].send(1, Alive())
        assert boxes[1].receive(5000) == [(0, Alive())]
        boxes.append(Mailbox(1, store, "127.0.0.1", birth=1))
        boxes[2].send(0, Alive())
        assert boxes[0].receive(5000) == [(1, Alive())]
        boxes[1].send(0, Leave())  # it is late
        assert boxes[0].receive(300) == []
        boxes[0].send(1, Leave())
        assert boxes[2].receive(300) == [] and boxes[1].receive(5000) == [(0, Leave())]
        boxes[0].reconnect(1)
        boxes[0].send(1, Retire())
        assert boxes[2].receive(5000) == [(0, Retire())] and boxes[1].receive(0) == []
        store.add(births_of(1), 3)
        boxes.append(Mailbox(1, store, "127.0.0.1", birth=2))
        boxes[0].reconnect_all()
        boxes[2].send(0, Alive())  # it is late, and the one after it has said nothing yet
        boxes[0].send(1, Retire())
        assert boxes[3].receive(5000) == [(0, Retire())] and boxes[0].receive(300) == []
    finally:
        for box in boxes:
            box.close()


def test_who_was_lost_comes_back_in_its_role_but_not_who_was_to_leave():
    roles = [("colocated-0", Role.COLOCATED), ("colocated-1", Role.COLOCATED), ("colocated-2", Role.COLOCATED)]
    cfg = load_config(["exec=simulated", "cluster.roles=[colocated,colocated,colocated]"])
    members = ClusterManager(roles, NoScaling(), build_global_scheduler(cfg, roles, rng=None))
    members.begin([Drain("colocated-1")], 0)
    for label in ("colocated-0", "colocated-1"):
        members.lost(label, 1)
    back = members.comes_back(0)
    assert (back.label, back.role, back.standing) == ("colocated-3", Role.COLOCATED, Standing.STARTING)
    assert members.comes_back(1) is None
    members.joined(back, 5)
    assert members.counts() == {"joined": 1, "left": 0, "lost": 2, "switched": 0}


def test_who_was_lost_does_not_come_back_beside_who_has_come_for_it():
    roles = [(f"{role}-{i}", role) for i, role in enumerate([Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE])]
    cfg = load_config(["exec=simulated", "cluster.roles=[prefill,prefill,decode,decode]", "mode=pd_caching_1"])
    members = ClusterManager(roles, NoScaling(), build_global_scheduler(cfg, roles, rng=None))
    members.lost("decode-2", 1)
    (starting,) = members.begin([Add(Role.DECODE)], 2)
    assert members.comes_back(2) is None, "a policy has replaced it"
    members.begin([Drain(starting.member.label)], 3)
    members.lost("prefill-1", 4)
    assert members.comes_back(1).label == "prefill-5"
    members.begin([Add(Role.PREFILL)], 5)
    assert members.comes_back(1) is None, "it is back, and the policy wants one more"


def test_who_ends_before_the_run_has_begun_was_never_in_it():
    roles = [("colocated-0", Role.COLOCATED), ("colocated-1", Role.COLOCATED)]
    cfg = load_config(["exec=simulated", "cluster=colocated_2"])
    members = ClusterManager(roles, NoScaling(), build_global_scheduler(cfg, roles, rng=None))
    members.lost("colocated-1", 0, has_begun=False)
    members.joined(members.comes_back(1), 0)
    assert members.counts() == {"joined": 0, "left": 0, "lost": 0, "switched": 0}
    assert members.stays_ns() == [(0, None), (0, None)]


def test_who_is_silent_serves_nobody_to_a_policy_until_it_is_back():
    roles = [("colocated-0", Role.COLOCATED), ("colocated-1", Role.COLOCATED)]
    scheduler = build_global_scheduler(load_config(["exec=simulated", "cluster=colocated_2"]), roles, rng=None)
    scaling = ByLoad({"colocated": 4}, max_instances=3, window_s=0.0)
    scaling.begin([Role.COLOCATED] * 2)
    members = ClusterManager(roles, scaling, scheduler)
    scheduler.instance_gone("colocated-0", 0)
    assert members.decide() == [] and members.draining == [], "who is left is not spared"
    scheduler.instance_gone("colocated-1", 1)
    (starting,) = members.decide()
    assert starting.member.label == "colocated-2", "of a role that nobody serves there is one more"
    scheduler.instance_back("colocated-0", 2)
    scheduler.instance_back("colocated-1", 2)
    members.joined(starting.member, 3)
    members.decide()
    assert [member.label for member in members.draining] == ["colocated-2"], "which goes when all are back"


class DrainsTheLast(Scaling):
    """Says so whenever it is asked."""

    def next_time_ns(self, last_ns):
        return (last_ns or 0) + 1

    def changes(self, loads, now_ns):
        return [Drain(loads[-1].label)]


def test_a_policy_may_say_again_that_an_instance_is_to_drain_which_waits_for_a_silent_one():
    roles = [("colocated-0", Role.COLOCATED), ("colocated-1", Role.COLOCATED)]
    scheduler = build_global_scheduler(load_config(["exec=simulated", "cluster=colocated_2"]), roles, rng=None)
    members = ClusterManager(roles, DrainsTheLast(), scheduler)
    scheduler.instance_gone("colocated-0", 0)  # silent: nobody knows that its process has ended
    assert [members.decide() for _ in range(3)] == [[]] * 3 and members.draining == []
    scheduler.instance_back("colocated-0", 1)
    members.retry_held(1)
    assert [member.label for member in members.draining] == ["colocated-1"]


class Noted:
    """In the place of a mailbox."""

    def __init__(self):
        self.sent = []

    def send(self, rank, message):
        self.sent.append((rank, message))

    def reaches(self, rank):
        return True


def test_who_comes_later_is_told_of_a_store_that_is_gone_and_gives_nothing_to_it():
    words = ["store=write_through", "fetch=always", "+per_role.store.kvcache.num_dram_blocks=20"]
    cfg = load_config(["exec=simulated", "cluster.roles=[colocated,store,store]", *words])
    roles = [("colocated-0", Role.COLOCATED), ("store-1", Role.STORE), ("store-2", Role.STORE)]
    members = ClusterManager(roles, NoScaling(), build_global_scheduler(cfg, roles, rng=None))
    roster, mailbox = Roster([1, 1, 1], num_spares=1), Noted()
    turnover = Turnover(members, roster, Watch(roster, 10.0), mailbox, 3)
    turnover.lose(1, 5, has_begun=True)
    (starting,) = members.begin([Add(Role.COLOCATED)], 6)
    roster.assign(starting.member.incarnation, 4)
    mailbox.sent.clear()
    turnover.welcome(starting.member.incarnation, 4, 7, 0, is_over=False)
    assert [message for rank, message in mailbox.sent if rank == 4] == [Start(0), Gone(1)]


def test_a_schedule_of_names_is_refused_where_names_shift():
    words = ["cluster.spares=1", "scaling=schedule", "cluster.store=h:1", "cluster.member=0"]
    with pytest.raises(
        ConfigError, match="scaling=schedule contradicts cluster.store=h:1: who rejoins has a new number"
    ):
        load_config([*DISTRIBUTED, *words])
