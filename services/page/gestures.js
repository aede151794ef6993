// Wheel, drag, pinch, click and keys on the map, as calls of the viewer.

const STEP = 1.4, PAN_PX = 80, CLICK_PX = 5, LINE_PX = 16, WHEEL = 0.0016;
const WAYS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};

export function listen(viewer) {
  const {canvas} = viewer;
  const pointers = new Map();  // Those that are down, and where they were last.
  let moved = 0;

  const place = event => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };

  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    const turned = event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_LINE ? LINE_PX : 1);
    viewer.zoom(Math.exp(-WHEEL * turned), place(event));
  }, {passive: false});

  canvas.addEventListener("pointerdown", event => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
    moved = pointers.size > 1 ? Infinity : 0;
  });

  canvas.addEventListener("pointermove", event => {
    const before = pointers.get(event.pointerId), now = place(event);
    if (!before) {
      viewer.setHover(viewer.rowAt(now));
      return;
    }
    const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
    if (other) {
      const [apart, wasApart] = [now, before].map(at => Math.hypot(at[0] - other[0], at[1] - other[1]));
      viewer.zoom(apart / Math.max(1, wasApart), other);
    } else {
      moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
      if (moved >= CLICK_PX) viewer.pan(before[0] - now[0], before[1] - now[1]);
    }
    pointers.set(event.pointerId, now);
  });

  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, event => {
      const isClick = name === "pointerup" && pointers.size === 1 && moved < CLICK_PX;
      pointers.delete(event.pointerId);
      if (isClick) viewer.pick(viewer.rowAt(place(event)));
    });
  }

  canvas.addEventListener("pointerleave", () => viewer.setHover(-1));

  canvas.addEventListener("keydown", event => {
    if (!viewer.size || event.ctrlKey || event.altKey || event.metaKey) return;
    const way = WAYS[event.key];
    if (way && (event.shiftKey || !viewer.field?.length)) viewer.pan(way[0] * PAN_PX, way[1] * PAN_PX);
    else if (way) viewer.step(...way);
    else if (event.key === "+" || event.key === "=") viewer.zoom(STEP);
    else if (event.key === "-") viewer.zoom(1 / STEP);
    else if (event.key === "0") viewer.fit();
    else if (event.key === "Enter" || event.key === " ") viewer.pick(viewer.cursor);
    else return;
    event.preventDefault();
  });
}
