package faults

import (
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"goods/test/harness"
)

// mostWaiting is how many COMMITs may wait for a synchronous standby: as many as the replicas allow
// together, and one of each kind of batch of theirs that began before it saw them.
const mostWaiting = 8 + 2*3

func promoted(s *scene) {
	s.sh("kill", "postgres")
	s.last(aWhile / 2)
	s.standby.Promote(s)
}

// switchedOver loses nothing, as a server that is stopped first sends its standby everything.
func switchedOver(s *scene) {
	s.sh("stop", "postgres")
	s.standby.Promote(s)
}

// create makes a good that belongs to no worker.
func (s *scene) create(key string) harness.Good {
	s.load.asked.Add(1)
	g, _, _ := s.load.create(key)
	return g
}

// commitsLost promotes a standby that lacks what the primary committed last. Afterwards the same goods get
// the same versions again, with other content, while NATS still has the events of the lost ones.
func commitsLost(s *scene) {
	g := s.create("kept")
	update := fmt.Sprintf("/goods/update?id=%d&projectId=1", g.ID)
	versions := func() int { return harness.One[int](s, s.World, `SELECT sum(version) FROM goods`) }
	s.standby.CatchUp(s)
	s.standby.StopReceiving(s)
	s.sh("pause", "clickhouse")
	harness.Want[harness.Good](s, s.apps[0], 200, "PATCH", update, text("lost"))
	for range 2 { // the second finds it in the cache
		for _, a := range s.apps {
			harness.Equal(s, a.List(s, 1, g.Priority).Goods[0].Name, "lost", "name before the failover")
		}
	}
	s.last(aWhile)
	committed := versions()
	s.load.void.Store(true)
	s.sh("kill", "postgres")
	s.standby.Promote(s)
	s.load.stop()
	s.DB.SetMaxIdleConns(0) // none may be left over from the server that has gone
	harness.Eventually(s, recoversWithin, func() error { return s.DB.Ping() })
	s.Logf("%d versions were committed, and lost", committed-versions())
	s.load.forget(s)
	harness.Eventually(s, recoversWithin, func() error {
		_, err := s.load.works(time.Now().Add(-time.Second))
		return err
	})
	harness.Want[harness.Good](s, s.apps[0], 200, "PATCH", update, text("new"))
	for _, a := range s.apps {
		harness.Equal(s, a.List(s, 1, g.Priority).Goods[0].Name, "new", "name after the failover")
	}
	s.sh("resume", "clickhouse")
	s.last(aWhile)
}

// standbyLost leaves the primary without the standby that each COMMIT waits for. Those that wait take
// connections of the server, whatever becomes of their clients.
func standbyLost(s *scene) {
	// Each edits another good every time: a good whose COMMIT waits is locked.
	const clients, edits = 64, 16
	ids := make([]int, clients*edits)
	harness.Together(clients, func(i int) {
		for n := i; n < len(ids); n += clients {
			ids[n] = s.create(fmt.Sprint("edited-", n)).ID
		}
	})
	s.load.hung.Store(math.MaxInt64)
	s.sh("kill", "standby")
	begin := time.Now()
	harness.Together(clients, func(i int) {
		for n := i; n < len(ids) && time.Since(begin) < 30*time.Second; n += clients {
			query := fmt.Sprintf("id=%d&projectId=1", ids[n])
			s.load.call("PATCH", "update", query, text("again"), &harness.Good{})
			s.last(rand.N(2 * pace))
		}
	})
	waiting := func() int {
		return harness.One[int](s, s.World, `SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'`)
	}
	n := waiting()
	s.Logf("%d COMMITs wait for the standby", n)
	if n > mostWaiting {
		s.Errorf("%d COMMITs wait for the standby, want %d at most", n, mostWaiting)
	}
	s.sh("start", "standby")
	harness.AwaitEqual(s, recoversWithin, func() bool { return waiting() < max(n, 1) }, true, "COMMITs go on")
	s.last(time.Second)
	s.load.hung.Store(time.Now().UnixNano())
}
