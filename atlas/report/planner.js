// The joint law of atlas/scaling/law.py over the fit's draws. Arrays are as there: [target], tau [target][source].
(() => {
  const plan = JSON.parse(document.getElementById("plan").textContent), root = document.getElementById("planner");
  const GUARD = 1e-3, BAND = [0.05, 0.95], Z90 = 1.6448536269514722, sources = plan.sources, targets = plan.targets;
  const sum = (values) => values.reduce((a, b) => a + b, 0);

  const saturation = (D, U, lam) => {
    if (U === null || D <= U) return D;
    const excess = D / U - 1, x = lam * excess;
    return U * (1 + excess * (Math.abs(x) < 1e-5 ? 1 - x / 2 + x * x / 6 : -Math.expm1(-x) / x));
  };
  const positive = (z) => {
    const x = z / GUARD;
    return GUARD * (x > 0 ? x + Math.log1p(Math.exp(-x)) : Math.LN2 / (1 - x / (2 * Math.LN2)));
  };
  const languages = (D, total) => Math.exp(-sum(D.map((d) => (d > 0 ? (d / total) * Math.log(d / total) : 0))));

  const substitution = (law, t) => (law.eta ? law.eta[t] : 1);
  const mixed = (law, D, t) => {
    const total = sum(D), rates = law.lam;
    return sum(D.map((d, s) => {
      const rate = rates[0].length > 1 ? rates[0][s] : rates[t][0];
      const share = saturation(d, plan.unique[s], rate) / total;
      return share > 0 ? law.tau[t][s] * share ** substitution(law, t) : 0;
    }));
  };
  const loss = (law, N, D, t) => {
    const total = sum(D), effective = total * positive(mixed(law, D, t)) ** (1 / substitution(law, t));
    const capacity = law.A[t] * languages(D, total) ** law.phi * N ** -law.alpha[t];
    return law.E[t] + capacity + law.B[t] * effective ** -law.beta[t];
  };
  const draws = (plan.draws ? plan.draws.phi : []).map((_, i) =>
    Object.fromEntries(Object.entries(plan.draws).map(([name, values]) => [name, values[i]])));
  const quantile = (sorted, q) => {
    const at = q * (sorted.length - 1), low = Math.floor(at);
    return sorted[low] + (at - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
  };
  // Null where the mixture lacks the target or leaves it hardly an effective token, which no law tells.
  const predict = (N, D, t) => {
    if (!(D[t] > 0)) return null;
    const z = mixed(plan.law, D, t);
    if (!(Math.sign(z) * Math.abs(z) ** (1 / substitution(plan.law, t)) >= plan.least[t])) return null;
    const drawn = draws.map((law) => loss(law, N, D, t)).sort((a, b) => a - b);
    const value = loss(plan.law, N, D, t), band = BAND.map((q) => (drawn.length ? quantile(drawn, q) : NaN));
    const reach = band.map((bound) => Math.hypot(Math.log(bound / value), Z90 * plan.noise));
    return [value, ...band, value * Math.exp(-reach[0]), value * Math.exp(reach[1])];
  };
  window.planner = { predict, sources, targets };

  const short = (x) => {
    const [scale, unit] = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"], [1, ""]].find(([s]) => x >= s) || [1, ""];
    return Number((x / scale).toPrecision(3)) + unit;
  };
  const element = (parent, name, attributes = {}, text = "") => {
    const made = Object.assign(document.createElement(name), attributes);
    made.textContent = text;
    return parent.appendChild(made);
  };
  const slider = (parent, label, least, most, value, text) => {
    const row = element(parent, "label", { className: "slider" });
    element(row, "span", {}, label);
    const input = element(row, "input", { type: "range", min: least, max: most, step: (most - least) / 1000, value });
    input.setAttribute("aria-label", label);
    const shown = element(row, "output");
    return { value: () => Number(input.value), show: () => (shown.textContent = text(Number(input.value))), input };
  };
  const controls = element(root, "div", { className: "sliders" });
  const logarithmic = ([least, largest, most], label) =>
    slider(controls, label, Math.log10(least), Math.log10(most), Math.log10(largest), (x) => short(10 ** x));
  const N = logarithmic(plan.N, "N, parameters"), D = logarithmic(plan.D, "D, tokens");
  const shares = sources.map((name) => slider(controls, name, 0, 100, 50, () => ""));
  const note = element(root, "p", { className: "note" });
  const table = element(element(root, "div", { className: "scroll" }), "table");

  const cells = (row, kind, texts) => texts.forEach((text) => element(row, kind, {}, text));
  const update = () => {
    const [n, d] = [10 ** N.value(), 10 ** D.value()], weights = shares.map((s) => s.value());
    const whole = sum(weights), tokens = weights.map((w) => (whole ? (d * w) / whole : 0));
    N.show(); D.show();
    shares.forEach((s, i) => (s.input.nextSibling.textContent = `${((100 * tokens[i]) / d).toFixed(1)} %`));
    const beyond = [[n, plan.N, "N"], [d, plan.D, "D"]].filter(([x, range]) => x > range[1] * 1.001);
    note.textContent = `${short(6 * n * d)} FLOPs. ` +
      beyond.map(([x, range, name]) => `${name} is ${(x / range[1]).toPrecision(2)} times that of the largest run. `).join("");
    table.replaceChildren();
    cells(element(table, "tr"), "th", ["language", `loss, ${plan.unit}`, "90 % of the laws", "90 % of new runs", "gain over an even mixture", "epochs"]);
    const even = sources.map(() => d / sources.length);
    targets.forEach((name, t) => {
      const row = element(table, "tr");
      const found = predict(n, tokens, t), alike = predict(n, even, t);
      if (!found) return cells(row, "td", [name, tokens[t] > 0 ? "beyond the runs" : "not trained", "–", "–", "–", "–"]);
      const [value, ...bounds] = found, gain = alike ? (alike[0] - value).toFixed(4) : "–";
      const epochs = plan.unique[t] === null ? "unknown" : (tokens[t] / plan.unique[t]).toPrecision(2);
      cells(row, "td", [name, value.toFixed(4), ...[0, 2].map((i) => isNaN(bounds[i]) ? "–" : `${bounds[i].toFixed(4)} to ${bounds[i + 1].toFixed(4)}`), gain, epochs]);
    });
  };
  controls.addEventListener("input", update);
  update();
})();
