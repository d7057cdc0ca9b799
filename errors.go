package main

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// failure is an error that a client is told about, as JSON. Every other error is internal: its text is for
// the log only.
type failure struct {
	Status  int               `json:"-"` // of HTTP
	Code    int               `json:"code"`
	Message string            `json:"message"`
	Details map[string]string `json:"details"` // by field: what is wrong with it
}

func (f *failure) Error() string {
	if len(f.Details) == 0 {
		return f.Message
	}
	return fmt.Sprint(f.Message, " ", f.Details)
}

var noDetails = map[string]string{}

// These are all failures that a client can get, in the order of their codes. Code 2 has details: see invalid.
var (
	// anything that is not expected; the cause is in the log
	errInternal = &failure{500, 1, "errors.internal", noDetails}
	// no such good in that project, or it is removed
	errGoodNotFound = &failure{404, 3, "errors.good.notFound", noDetails}
	// create or list for a project that does not exist
	errCampaignNotFound = &failure{404, 4, "errors.campaign.notFound", noDetails}
	// unknown path
	errRouteNotFound = &failure{404, 5, "errors.route.notFound", noDetails}
	// known path, wrong method
	errMethodNotAllowed = &failure{405, 6, "errors.method.notAllowed", noDetails}
	// body over maxBody
	errTooLarge = &failure{413, 7, "errors.request.tooLarge", noDetails}
	// Postgres, or for a history ClickHouse, cannot serve now; or the service is busy
	errUnavailable = &failure{503, 8, "errors.service.unavailable", noDetails}
	// the Idempotency-Key was first sent with another name or description
	errKeyReused = &failure{422, 9, "errors.request.keyReused", noDetails}
	// a write from a page of another origin
	errCrossOrigin = &failure{403, 10, "errors.request.crossOrigin", noDetails}
	// the body did not arrive in time
	errBodyTimeout = &failure{408, 11, "errors.request.timeout", noDetails}
	// the good does not have the version that If-Match names
	errGoodChanged = &failure{412, 12, "errors.good.changed", noDetails}
)

// invalid returns the failure of a request with these bad fields.
func invalid(details map[string]string) *failure {
	return &failure{400, 2, "errors.request.invalid", details}
}

// Errors inside the service, which no client sees.
var (
	// errOutcomeUnknown marks an error after which a write may or may not be in Postgres: the service never
	// repeats it.
	errOutcomeUnknown = errors.New("outcome unknown")
	// errLocked is the error of a request whose good another transaction holds for too long.
	errLocked = errors.New("another transaction holds the good")
	// errServerChanged is the error of a list that found the database on another server after each attempt,
	// or a page without the goods that were there a moment before.
	errServerChanged = errors.New("the database has moved to another server")
	// errNoMemory is the error of a reply that waited too long for other large replies to be read.
	errNoMemory = errors.New("other large replies take all memory that there is for them")
)

// unavailable reports whether err means that Postgres, or the service, cannot serve now, so that a retry may
// succeed. That includes a server that has become a standby or read-only: another one will take its place.
func unavailable(err error) bool {
	if e := pq.As(err); e != nil {
		switch e.Code.Class() {
		case pqerror.ClassConnectionException, pqerror.ClassInsufficientResources,
			pqerror.ClassOperatorIntervention, pqerror.ClassTransactionRollback:
			return true
		}
		switch e.Code {
		case pqerror.LockNotAvailable, pqerror.ReadOnlySQLTransaction,
			pqerror.IdleInTransactionSessionTimeout, pqerror.FeatureNotSupported:
			// The third comes after a pause of this process. (Where the server speaks English, lib/pq turns
			// it into driver.ErrBadConn, as every FATAL error.) The last is how a standby refuses the BEGIN
			// READ WRITE of lib/pq; no statement of ours asks for a feature that a primary lacks.
			return true
		}
		return false
	}
	for _, cause := range []error{
		driver.ErrBadConn,
		context.DeadlineExceeded,
		context.Canceled,
		errLocked,
		errServerChanged,
		errNoMemory,
	} {
		if errors.Is(err, cause) {
			return true
		}
	}
	return false
}
