/** Keys of the whole page. They are left alone while something is typed or chosen, and with modifier keys. */

export type Action =
  | { do: "step"; what: "layer" | "head" | "view" | "sample"; by: number }
  | { do: "cls" | "mode" | "scale" | "overlay" | "wall" | "release" | "theme" | "help" };

const ACTIONS: Record<string, Action> = {
  ArrowLeft: { do: "step", what: "head", by: -1 },
  ArrowRight: { do: "step", what: "head", by: 1 },
  ArrowUp: { do: "step", what: "layer", by: -1 },
  ArrowDown: { do: "step", what: "layer", by: 1 },
  n: { do: "step", what: "sample", by: 1 },
  p: { do: "step", what: "sample", by: -1 },
  v: { do: "step", what: "view", by: 1 },
  c: { do: "cls" },
  m: { do: "mode" },
  s: { do: "scale" },
  o: { do: "overlay" },
  w: { do: "wall" },
  t: { do: "theme" },
  Escape: { do: "release" },
  "?": { do: "help" },
};

export function listenToKeys(act: (action: Action) => void): void {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const target = event.target as Element;
    // A dialog that was just closed keeps the focus for a moment: keys typed then are for the page.
    if (target.closest("input:not([type=radio]), select, textarea, dialog[open]")) return;
    // Radio buttons move by arrows themselves.
    if (target.closest("input[type=radio]") && event.key.startsWith("Arrow")) return;
    const action = ACTIONS[event.key];
    if (!action) return;
    event.preventDefault();
    act(action);
  });
}

/** Light or dark: what the system says until the user chooses; the choice is kept in this browser. */
export function switchTheme(): void {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  try {
    localStorage.setItem("atcache-theme", root.dataset.theme);
  } catch {
    // A page from a file, or with cookies off, may keep nothing: then the choice lasts as long as the page.
  }
}

export function restoreTheme(): void {
  try {
    const kept = localStorage.getItem("atcache-theme");
    if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  } catch {
    // As above.
  }
}
