"""What an instance does with others' messages; its steps are played in tests/sched and tests/test_automata.py."""

from memserve import LocalCluster, load_config


def test_the_sessions_served_are_gathered_only_for_a_step_that_has_messages_of_others_to_read():
    words = ["exec=simulated", "cluster=1p1d", "mode=pd_caching_3", "workload=synthetic", "workload.num_sessions=6"]
    cluster, seen = LocalCluster(load_config(words)).cluster(), []
    for node in cluster.nodes:
        instance, receive = node.instance, node.instance.handoffs.receive

        def looked_at(inbox, sessions, now_ns, instance=instance, receive=receive):
            seen.append((bool(inbox), bool(sessions), instance.num_unfinished > 0))
            receive(inbox, sessions, now_ns)

        instance.handoffs.receive = looked_at
    while cluster.advance():
        pass
    assert all(has_sessions == (has_messages and serves) for has_messages, has_sessions, serves in seen)
    assert {(has_messages, serves) for has_messages, _, serves in seen} >= {(True, True), (False, True)}
